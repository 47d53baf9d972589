"""API keys and their digests. Only digests are stored; a key exists at its client, and in memory while a request is checked.

A digest is ``sha256:`` and 64 lower-case hexadecimal digits. A plain hash is enough because keys are long and random
(``new_key`` has 256 bits), and a slow one would let anybody spend the server's time with made-up keys.
"""

import hashlib
import re
import secrets

from matgptq_vllm.core.errors import InputError

DIGEST_PREFIX = "sha256:"

DIGEST = re.compile(r"sha256:[0-9a-f]{64}")
"""What a stored key looks like."""

KEY_PREFIX = "matgptq-"
"""Begins every generated key, so that scanners for leaked secrets can recognize one."""

MIN_KEY_CHARS = 16
"""Shorter keys could be guessed from their digest."""

MAX_KEY_CHARS = 512

_KEY = re.compile(r"[!-~]+")  # What travels unchanged in `Authorization: Bearer KEY`.


def digest_of(key: str) -> str:
    """The digest under which ``key`` is stored; defined for every string."""
    return DIGEST_PREFIX + hashlib.sha256(key.encode("utf-8", "surrogatepass")).hexdigest()


def new_key() -> str:
    """A new random key, from the operating system's generator."""
    return KEY_PREFIX + secrets.token_urlsafe(32)


def check_key(key: str) -> str:
    """Return ``key`` if it can be used as an API key.

    Raises:
        InputError: too short, too long, or with characters that a header cannot carry. The message does not quote it.
    """
    if not MIN_KEY_CHARS <= len(key) <= MAX_KEY_CHARS:
        raise InputError(
            f"the key has {len(key)} characters; it needs {MIN_KEY_CHARS} to {MAX_KEY_CHARS}, and to be random: "
            "`matgptq hash-key --new` makes one"
        )
    if not _KEY.fullmatch(key):
        raise InputError(
            "the key has a space, a control character or one outside ASCII, which a header does not carry unchanged; "
            "`matgptq hash-key --new` makes one that it does"
        )
    return key
