"""Traces recorded elsewhere, as CSV files in the format of Azure's LLM inference traces.

Columns TIMESTAMP (ISO 8601; fractions of any length), ContextTokens and GeneratedTokens, in any order; others are ignored. See
https://github.com/Azure/AzurePublicDataset.
"""

import csv
import re
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from matgptq_vllm.core.errors import FormatError

COLUMNS = ("TIMESTAMP", "ContextTokens", "GeneratedTokens")


@dataclass(frozen=True)
class RecordedRequest:
    """One line of a trace."""

    time_s: float
    """Since the first request of the trace."""
    input_tokens: int
    output_tokens: int


def read_recorded(path: Path) -> list[RecordedRequest]:
    """The requests of a trace by time. FormatError names the line that is wrong."""
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file)
        missing = [name for name in COLUMNS if name not in (reader.fieldnames or ())]
        if missing:
            raise FormatError(f"{path} has no column {', '.join(missing)}; a trace has the columns {', '.join(COLUMNS)}")
        found = []
        for row in reader:
            try:
                found.append((_time(row["TIMESTAMP"]), _count(row["ContextTokens"]), _count(row["GeneratedTokens"])))
            except (AttributeError, TypeError, ValueError) as error:
                raise FormatError(f"{path}, line {reader.line_num}: {error}") from None
    if not found:
        raise FormatError(f"{path} has no requests; after the line of column names, a trace has one line per request")
    found.sort()
    return [RecordedRequest(time - found[0][0], prompt, output) for time, prompt, output in found]


def _time(text: str) -> float:
    # Python reads up to six digits of a second before 3.11; the published traces have seven.
    trimmed = re.sub(r"(\.\d{1,6})\d*", lambda match: match[1].ljust(7, "0"), text.strip()).replace("Z", "+00:00")
    return datetime.fromisoformat(trimmed).timestamp()


def _count(text: str) -> int:
    count = int(text)
    if count < 1:
        raise ValueError(f"{count} tokens; every request has at least one prompt token and one generated token")
    return count
