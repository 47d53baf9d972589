"""``matgptq hash-key``: the digest of an API key, for a tenant file. A key is never an argument: others could list it."""

import argparse
import getpass
import sys

from matgptq_vllm.core.errors import InputError
from serve.api_keys import MAX_KEY_CHARS, check_key, digest_of, new_key

DESCRIPTION = """\
Print the digest of an API key, which a tenant file holds in place of the key. The key is read from standard input, or
asked for without echo. With --new, a random key is made: give it to the client, it is not kept anywhere."""

EPILOG = """\
examples:
  matgptq hash-key --new
  matgptq hash-key < key.txt
"""


def add_verbs(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Register the verb ``hash-key``; its ``run(namespace)`` returns an exit status and raises MatGPTQError."""
    verb = subparsers.add_parser(
        "hash-key",
        help="make an API key, or the digest of one for a tenant file",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    verb.add_argument("--new", action="store_true", help="make a random key; print it and its digest")
    verb.set_defaults(run=run)


def run(namespace: argparse.Namespace) -> int:
    """Print the digest, or key and digest.

    Raises:
        InputError: no key, one that no client could send, or one that could be guessed.
    """
    if namespace.new:
        key = new_key()
        print(f"key:    {key}\ndigest: {digest_of(key)}")
        return 0
    print(digest_of(check_key(_read_key())))
    return 0


def _read_key() -> str:
    if sys.stdin.isatty():
        return getpass.getpass("API key: ")
    # Bounded: standard input may be anything. The end of one line, as editors and echo leave it, is not part of the key.
    text = sys.stdin.buffer.read(MAX_KEY_CHARS + 3).decode("utf-8", "replace").removesuffix("\n").removesuffix("\r")
    if not text:
        raise InputError("standard input has no key; write the key to it, or run `matgptq hash-key --new` to make one")
    return text
