"""A JSON object as the spans of its top-level members, so that a few can be replaced and the rest kept byte for byte.

Parsing a request body to Python and writing it back would change what the client sent (number spelling, key order,
duplicate keys) and cost a second pass over prompts of megabytes. Values are scanned by the C scanner of ``json``.
"""

import json
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

_DECODER = json.JSONDecoder()
_SPACE = re.compile(r"[ \t\n\r]*")


@dataclass(frozen=True)
class Member:
    """One ``"key": value`` of an object."""

    key: str
    value: Any
    start: int
    """Where the key begins in the text of the object."""

    value_start: int
    end: int
    """Where the value ends."""


@dataclass(frozen=True)
class JsonObject:
    """A JSON object and the text it was read from."""

    text: str = field(repr=False)
    members: tuple[Member, ...] = field(repr=False)
    """In order, duplicates included."""

    @classmethod
    def parse(cls, text: str) -> "JsonObject":
        """The object that ``text`` is.

        Raises:
            ValueError: ``text`` is not one JSON object. The message says where, and quotes nothing of it.
        """
        try:
            return cls(text, tuple(_members(text)))
        except json.JSONDecodeError as error:
            raise ValueError(f"{error.msg} at character {error.pos}") from None
        except RecursionError:
            raise ValueError("nested too deeply") from None

    def get(self, key: str) -> Any:
        """The value of ``key``, the last one if there are several, or None."""
        return next((member.value for member in reversed(self.members) if member.key == key), None)

    def repeated(self, keys: Iterable[str]) -> list[str]:
        """Those of ``keys`` that occur more than once."""
        found = [member.key for member in self.members]
        return [key for key in keys if found.count(key) > 1]

    def nested(self, key: str) -> "JsonObject | None":
        """The object that is the value of ``key``, or None if there is none or it is no object."""
        for member in reversed(self.members):
            if member.key == key and isinstance(member.value, dict):
                return JsonObject.parse(self.text[member.value_start : member.end])
        return None

    def with_members(self, replacements: Mapping[str, Any], removed: Collection[str] = ()) -> str:
        """The object with ``replacements`` set and ``removed`` left out; every other member as it was written."""
        new = [f"{json.dumps(key)}:{json.dumps(value)}" for key, value in replacements.items()]
        gone = {*replacements, *removed}
        kept = [self.text[member.start : member.end] for member in self.members if member.key not in gone]
        return "{" + ",".join(new + kept) + "}"


def _members(text: str) -> Iterable[Member]:
    position = _after_space(text, 0)
    if text[position : position + 1] != "{":
        raise ValueError("an object was expected")
    position = _after_space(text, position + 1)
    if text[position : position + 1] != "}":
        while True:
            start = position
            key, value_start = _value_start(text, start)
            value, end = _DECODER.raw_decode(text, value_start)
            yield Member(key, value, start, value_start, end)
            position = _after_space(text, end)
            separator = text[position : position + 1]
            if separator == "}":
                break
            if separator != ",":
                raise json.JSONDecodeError("Expecting ',' or '}'", "", position)
            position = _after_space(text, position + 1)
    position = _after_space(text, position + 1)
    if position != len(text):
        raise json.JSONDecodeError("Extra data", "", position)


def _value_start(text: str, start: int) -> tuple[str, int]:
    """The key at ``start`` and where its value begins."""
    if text[start : start + 1] != '"':
        raise json.JSONDecodeError("Expecting a key in double quotes", "", start)
    key, position = _DECODER.raw_decode(text, start)
    position = _after_space(text, position)
    if text[position : position + 1] != ":":
        raise json.JSONDecodeError("Expecting ':'", "", position)
    return key, _after_space(text, position + 1)


def _after_space(text: str, position: int) -> int:
    match = _SPACE.match(text, position)
    assert match is not None
    return match.end()
