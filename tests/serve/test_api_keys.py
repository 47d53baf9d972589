"""API keys and their digests."""

import hashlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from matgptq_vllm.core.errors import InputError
from serve.api_keys import DIGEST, KEY_PREFIX, MAX_KEY_CHARS, MIN_KEY_CHARS, check_key, digest_of, new_key


def test_a_digest_is_the_sha256_of_the_key():
    assert digest_of("some-key") == "sha256:" + hashlib.sha256(b"some-key").hexdigest()


@given(st.binary().map(lambda raw: raw.decode("latin-1")))
def test_whatever_a_header_holds_has_a_digest(key):
    assert DIGEST.fullmatch(digest_of(key))


def test_a_lone_surrogate_has_a_digest():
    assert DIGEST.fullmatch(digest_of("\udcff"))


def test_new_keys_are_usable_long_and_different():
    keys = {new_key() for _ in range(20)}
    assert len(keys) == 20
    assert all(check_key(key) == key and key.startswith(KEY_PREFIX) and len(key) >= len(KEY_PREFIX) + 43 for key in keys)


@pytest.mark.parametrize("length", [0, MIN_KEY_CHARS - 1, MAX_KEY_CHARS + 1])
def test_a_key_that_could_be_guessed_or_is_no_key_is_refused(length):
    with pytest.raises(InputError, match=f"has {length} characters; it needs {MIN_KEY_CHARS} to {MAX_KEY_CHARS}"):
        check_key("k" * length)


@pytest.mark.parametrize("character", [" ", "\n", "\t", "\x00", "é", "\x7f", "\ufffd"])
def test_a_key_that_a_header_does_not_carry_is_refused_unquoted(character):
    with pytest.raises(InputError) as caught:
        check_key("first-half-of-it" + character + "second-half")
    assert "half" not in str(caught.value)


@pytest.mark.parametrize("length", [MIN_KEY_CHARS, MAX_KEY_CHARS])
def test_lengths_at_the_bounds_are_fine(length):
    assert check_key("~" * length) == "~" * length
