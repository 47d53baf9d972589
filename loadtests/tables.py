"""Tables for people: in a terminal, and in Markdown."""

from collections.abc import Sequence


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """Rows of a table as lines, every column as wide as its widest cell."""
    return "\n".join("  ".join(row) for row in _padded(rows))


def markdown(heading: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a Markdown table, numbers to the right."""
    padded = _padded([heading, *rows])
    ruler = ["-" * (len(cell) - 1) + ":" for cell in padded[0]]
    return [f"| {' | '.join(row)} |" for row in [padded[0], ruler, *padded[1:]]]


def _padded(rows: Sequence[Sequence[str]]) -> list[list[str]]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [[cell.rjust(width) for cell, width in zip(row, widths, strict=True)] for row in rows]
