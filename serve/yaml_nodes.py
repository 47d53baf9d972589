"""YAML as nodes with their places, for files whose errors have to name line and column.

The text is plain data: anchors, aliases and tags are refused, so that its size bounds the work of reading it and nothing
in it is code. Nothing but nodes is built.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import yaml

from matgptq_vllm.core.errors import FormatError

MAX_DEPTH = 8
"""Deepest nesting that is read."""

LOADER: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
"""The parser in C, where PyYAML was built with it: eight times as fast, same nodes."""

_UNPRINTABLE = re.compile("[^\t\n\r\x20-\x7e\x85\xa0-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


@dataclass(frozen=True)
class YamlSource:
    """Makes nodes and errors of one text; ``name`` is where it was read."""

    name: str

    def compose(self, data: bytes) -> Any:
        """The root node of the UTF-8 text ``data``; None if it is empty.

        Raises:
            FormatError: it is not one YAML document of plain data.
        """
        text = self._decode(data)
        try:
            # Events first: they come without recursion, which a deep text could exhaust.
            for event, depth in _with_depth(yaml.parse(text, Loader=LOADER)):
                self._check_event(event, depth)
            return yaml.compose(text, Loader=LOADER)
        except yaml.MarkedYAMLError as error:
            mark = error.problem_mark or error.context_mark
            line, column = (mark.line + 1, mark.column + 1) if mark else (1, 1)
            raise self.error(line, column, f"not YAML: {error.problem or error.context}") from None

    def mapping(self, node: Any, what: str) -> dict[str, tuple[Any, Any]]:
        """The entries of ``node``: name -> nodes of name and value. ``what`` names it in messages.

        Raises:
            FormatError: it is no mapping, or a name is no text or is there twice.
        """
        if not isinstance(node, yaml.MappingNode):
            raise self.at(node, f"{what} is {kind(node)}; it must be a mapping, with `name: value` on each line")
        entries: dict[str, tuple[Any, Any]] = {}
        for key, value in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise self.at(key, f"a name in {what} is {kind(key)}; it must be text")
            if key.value in entries:
                raise self.at(key, f"{shown(key)} is in {what} twice, first on line {line_of(entries[key.value][0])}; keep one")
            entries[key.value] = (key, value)
        return entries

    def at(self, place: Any, message: str) -> FormatError:
        """The error ``name:line:column: message`` for a node or event."""
        return self.error(line_of(place), place.start_mark.column + 1, message)

    def error(self, line: int, column: int, message: str) -> FormatError:
        """The error ``name:line:column: message``; both count from 1."""
        return FormatError(f"{self.name}:{line}:{column}: {message}")

    def _decode(self, data: bytes) -> str:
        try:
            text = data.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            # With a byte order mark, positions count from behind it.
            place = _line_column(error.object[: error.start].decode("utf-8"))
            raise self.error(*place, f"byte {error.object[error.start]:#x} is not UTF-8; save it as UTF-8") from None
        found = _UNPRINTABLE.search(text)
        if found:
            raise self.error(*_line_column(text[: found.start()]), f"character {found.group()!r} is not allowed; remove it")
        return text

    def _check_event(self, event: Any, depth: int) -> None:
        if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None) is not None:
            raise self.at(event, "anchors (&name) and aliases (*name) are not allowed; write the value where it is needed")
        if getattr(event, "tag", None) is not None:
            raise self.at(event, f"the tag {shown(event.tag)} is not allowed; leave it out")
        if depth > MAX_DEPTH:
            raise self.at(event, f"it is nested more than {MAX_DEPTH} deep, which is the limit")


def line_of(place: Any) -> int:
    """Line, from 1, on which a node or event begins."""
    return place.start_mark.line + 1


def kind(node: Any) -> str:
    """What a node is, without its text, which may be a secret."""
    if isinstance(node, yaml.MappingNode):
        return "a mapping"
    if isinstance(node, yaml.SequenceNode):
        return "a list"
    return f"a text of length {len(node.value)}" if node.value else "empty"


def shown(value: Any) -> str:
    """A node or a text, as a message shows it."""
    text = value.value if isinstance(value, yaml.ScalarNode) else value
    if not text or not isinstance(text, str):
        return kind(value) if isinstance(value, yaml.Node) else repr(text)
    return repr(text) if len(text) <= 80 else repr(text[:80]) + "..."


def _with_depth(events: Iterator[Any]) -> Iterator[tuple[Any, int]]:
    depth = 0
    for event in events:
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        yield event, depth


def _line_column(before: str) -> tuple[int, int]:
    return before.count("\n") + 1, len(before) - (before.rfind("\n") + 1) + 1
