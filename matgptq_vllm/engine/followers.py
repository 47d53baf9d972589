"""Followers: running requests whose profile follows the level of a group, and when each of them changes.

A request computes its whole prompt at the profile that it was admitted at, so that what the prefix cache keeps of it belongs
to that profile. After its prompt it changes with the next step, wherever that is in a block: the blocks after its prompt are
its own (``compat.scheduler`` hashes them with its id), so no other request can come upon one that holds two profiles. All of a
group change together, but for those that compute their prompts: a step that reads two widths is slower than one at either.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass


@dataclass(slots=True)
class _Member:
    group: str
    admitted: int
    """Profile index at admission."""

    profile: int
    num_prompt_tokens: int


class Followers:
    """Pure bookkeeping; profiles are indices. A step costs nothing while no change is pending."""

    def __init__(self) -> None:
        self._members: dict[str, _Member] = {}
        self._levels: dict[str, int] = {}
        self._pending: set[str] = set()

    def add(self, req_id: str, group: str, profile: int, num_prompt_tokens: int) -> None:
        """A request of ``group`` begins, or begins again, at ``profile``."""
        self._members[req_id] = _Member(group, profile, profile, num_prompt_tokens)
        self._judge(req_id)

    def remove(self, req_id: str) -> None:
        """Forget a request; one that follows nothing is ignored."""
        self._members.pop(req_id, None)
        self._pending.discard(req_id)

    def restart(self, req_id: str, profile: int) -> int:
        """The profile at which a preempted request is computed again: that of its admission, ``profile`` if it follows
        nothing."""
        member = self._members.get(req_id)
        if member is None:
            return profile
        member.profile = member.admitted
        self._judge(req_id)
        return member.profile

    def set_levels(self, levels: Mapping[str, int | None]) -> None:
        """Take up the new profiles of groups; None forgets a group, whose members then stay as they are."""
        for group, level in levels.items():
            if level is None:
                self._levels.pop(group, None)
            else:
                self._levels[group] = level
        for req_id, member in self._members.items():
            if member.group in levels:
                self._judge(req_id)

    def due(self, req_ids: Sequence[str], num_computed: Sequence[int]) -> Iterator[tuple[str, int]]:
        """(request, new profile) of those that change before a step that finds ``num_computed`` tokens of each computed."""
        if not self._pending:
            return
        for req_id, computed in zip(req_ids, num_computed, strict=True):
            if req_id not in self._pending:
                continue
            member = self._members[req_id]
            if computed < member.num_prompt_tokens:
                continue
            member.profile = self._levels[member.group]
            self._pending.discard(req_id)
            yield req_id, member.profile

    def _judge(self, req_id: str) -> None:
        member = self._members[req_id]
        if self._levels.get(member.group, member.profile) == member.profile:
            self._pending.discard(req_id)
        else:
            self._pending.add(req_id)
