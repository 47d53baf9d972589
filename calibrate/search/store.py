"""Store what was found: the profile in the parent's table, which serving reads, and how it was found in a log beside it."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matgptq_vllm.core.checkpoint_writer import write_profiles
from matgptq_vllm.core.errors import InputError
from matgptq_vllm.core.profile import Profile
from matgptq_vllm.core.summary import ParentSummary

SEARCH_LOG_FILE = "search_log.json"
"""Name of a found profile -> how it was found, and how good it is."""


def check_names(parent: ParentSummary, names: Sequence[str], overwrite: bool) -> None:
    """InputError if a profile of one of ``names`` is stored already, unless it may be replaced."""
    stored = {profile.name for profile in parent.stored_profiles()}
    taken = [name for name in names if name in stored]
    if taken and not overwrite:
        raise InputError(
            f"{parent.directory} has a profile {taken[0]!r} already; choose another --name, or pass --overwrite to replace it"
        )


def store_profiles(parent: ParentSummary, found: Sequence[Profile], log: Mapping[str, Any]) -> None:
    """Add ``found`` to the parent's table, in place of profiles of the same names. The table is replaced in one step.

    Args:
        log: JSON values to keep for each found profile, by name.
    """
    path = parent.directory / SEARCH_LOG_FILE
    temporary = path.with_name(f".{SEARCH_LOG_FILE}.partial")
    temporary.write_text(json.dumps({**read_log(parent.directory), **log}, indent=1) + "\n", encoding="utf-8")
    temporary.replace(path)
    # Read again now: another profile may have been stored while this one was searched.
    table = {profile.name: profile for profile in (*parent.stored_profiles(), *found)}
    write_profiles(parent.directory, list(table.values()))


def read_log(directory: Path) -> dict[str, Any]:
    """The search log of a parent; empty if there is none. A damaged one is begun anew: nothing depends on it."""
    try:
        document = json.loads((directory / SEARCH_LOG_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return document if isinstance(document, dict) else {}
