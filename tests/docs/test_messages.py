"""Every message that the troubleshooting page quotes is one that the code can write."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "troubleshooting.md"
GAP = "…"
SOURCES = ("matgptq_vllm", "serve", "calibrate", "loadtests")
FOREIGN = "## Images and clusters"
"""From here on the page quotes other programs."""


def templates() -> list[str]:
    """All strings of the sources; a value inside is a gap, as are the names of our own constants."""
    found = []
    for folder in SOURCES:
        for path in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.JoinedStr):
                    parts = [part.value if isinstance(part, ast.Constant) else GAP for part in node.values]
                    found.append("".join(map(str, parts)))
                elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                    found.append(node.value)
    return found


def quoted() -> list[str]:
    """The first cell of every row, which may quote a command in its own backquotes."""
    text = PAGE.read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(.*?)` \|", text[: text.index(FOREIGN)], re.MULTILINE)
    assert len(rows) == text[: text.index(FOREIGN)].count("\n| `")
    return rows


TEMPLATES = templates()
MOST = 0.6
"""Of a message, the share that one template must account for: what it is about comes from elsewhere, a file's name say."""


def can_be_written(message: str) -> bool:
    """Whether a template has the message in it, each gap of either being any text."""
    if any(message in template for template in TEMPLATES):
        return True
    # A template's gap may hold what the page spells out: --config for the name of an option.
    pattern = ".*".join(map(re.escape, message.split(GAP)))
    for template in TEMPLATES:
        if len(re.sub(r"[^a-z]", "", template)) < 12:
            continue
        if re.search(pattern, template):
            return True
        found = re.search(".{1,80}?".join(map(re.escape, template.split(GAP))), message)
        if found is not None and len(found.group()) > len(message) * MOST:
            return True
    return False


@pytest.mark.parametrize("message", quoted())
def test_a_quoted_message_exists(message: str) -> None:
    assert can_be_written(message)


def test_a_message_that_nobody_writes_is_found_out() -> None:
    assert not can_be_written("the replica has run out of … bits; insert more")
    assert not can_be_written("precision … is not held by this replica; go away")
