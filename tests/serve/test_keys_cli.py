"""``matgptq hash-key``."""

import argparse
import getpass
import io

import pytest

from matgptq_vllm.core.errors import InputError
from serve.api_keys import DIGEST, MAX_KEY_CHARS, digest_of
from serve.keys_cli import add_verbs

KEY = "sk-0123456789abcdef"


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def run(*arguments: str) -> int:
    parser = argparse.ArgumentParser()
    add_verbs(parser.add_subparsers(required=True))
    namespace = parser.parse_args(["hash-key", *arguments])
    return namespace.run(namespace)


@pytest.fixture
def type_in(monkeypatch):
    """What arrives on standard input, which is a pipe."""

    def give(content: bytes) -> None:
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(content), encoding="utf-8"))

    return give


@pytest.mark.parametrize("ending", ["", "\n", "\r\n"])
def test_a_key_from_standard_input_is_hashed_without_the_end_of_its_line(type_in, capsys, ending):
    type_in((KEY + ending).encode())
    assert run() == 0
    assert capsys.readouterr().out == digest_of(KEY) + "\n"


def test_a_key_at_a_terminal_is_asked_for_without_echo(monkeypatch, capsys):
    monkeypatch.setattr("sys.stdin", Terminal("not read"))
    monkeypatch.setattr(getpass, "getpass", lambda prompt: KEY)
    assert run() == 0
    assert capsys.readouterr().out == digest_of(KEY) + "\n"


def test_a_new_key_is_printed_with_its_digest(capsys):
    assert run("--new") == 0
    first, second = capsys.readouterr().out.splitlines()
    key = first.removeprefix("key:    ")
    assert DIGEST.fullmatch(second.removeprefix("digest: "))
    assert second == f"digest: {digest_of(key)}"


@pytest.mark.parametrize("arguments", [[KEY], ["--key", KEY], ["--ne"]])
def test_a_key_is_never_an_argument(arguments, capsys):
    with pytest.raises(SystemExit) as caught:
        run(*arguments)
    assert caught.value.code == 2
    assert digest_of(KEY) not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "standard input has no key"),
        (b"\n", "standard input has no key"),
        (b"short\n", "the key has 5 characters; it needs 16 to 512"),
        (b"x" * (10 * MAX_KEY_CHARS), "characters; it needs 16 to 512"),
        (b"x" * (MAX_KEY_CHARS + 1) + b"\r\n", "the key has 513 characters"),
        (f"{KEY}\n{KEY}\n".encode(), "the key has a space, a control character"),
        (f"{KEY} \n".encode(), "the key has a space, a control character"),
        (KEY.encode() + b"\xff\n", "outside ASCII"),
    ],
)
def test_what_cannot_be_a_key_is_refused_unquoted(type_in, capsys, content, message):
    type_in(content)
    with pytest.raises(InputError, match=message) as caught:
        run()
    assert KEY not in str(caught.value)
    assert capsys.readouterr().out == ""


def test_the_longest_key_is_read_whole(type_in, capsys):
    type_in(b"y" * MAX_KEY_CHARS + b"\r\n")
    assert run() == 0
    assert capsys.readouterr().out == digest_of("y" * MAX_KEY_CHARS) + "\n"
