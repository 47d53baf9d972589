"""How our times stand to the competition's, and what each ratio is meant to be.

    M             width 2, 3, 4                       width 6, 8                          half 4, half 8
    1 .. 16       best 4-bit peer / ours, at least    best 8-bit peer / ours, at least    ours / width 8, at most
    17 .. 64      the same                            the same                            the same
    65 .. 1023    ours / best of the 4-bit peers      ours / best of the 8-bit peers      ours / width 8, at most
                  and bf16, at most                   and bf16, at most
    1024 and up   ours / bf16, at most                ours / bf16, at most                ours / width 8, at most

Width 6 has no target, nor has any M between 257 and 1023.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from matgptq_vllm.kernels.bench.competitors import BF16, MACHETE, MARLIN, MIXED, UNIFORM, Competitor
from matgptq_vllm.kernels.bench.results import Sums

SMALL, MEDIUM, LARGE, BETWEEN, HUGE = range(5)

TARGETS: dict[tuple[str, int], float] = {
    (UNIFORM[8].key, SMALL): 1.2,
    (UNIFORM[8].key, MEDIUM): 1.0,
    (UNIFORM[4].key, SMALL): 1.4,
    (UNIFORM[4].key, MEDIUM): 1.1,
    (UNIFORM[3].key, SMALL): 1.6,
    (UNIFORM[3].key, MEDIUM): 1.2,
    (UNIFORM[2].key, SMALL): 1.9,
    (UNIFORM[2].key, MEDIUM): 1.2,
    **{(UNIFORM[width].key, LARGE): 1.05 for width in (2, 3, 4, 8)},
    **{(UNIFORM[width].key, HUGE): 1.10 for width in (2, 3, 4, 8)},
    (MIXED.key, SMALL): 1.15,
    (MIXED.key, MEDIUM): 1.15,
    (MIXED.key, LARGE): 1.35,
    (MIXED.key, HUGE): 1.25,
}
"""(key, band of M): speed-up to reach where a ratio is peer / ours, else the ratio not to exceed."""


@dataclass(frozen=True)
class Ratio:
    """One cell of the table of ratios."""

    value: float
    against: str
    """Label of the competitor that ours is compared with."""
    is_speedup: bool
    """Peer / ours, so that more is better; otherwise ours / peer."""
    target: float | None

    @property
    def is_met(self) -> bool | None:
        """None without a target."""
        if self.target is None:
            return None
        return self.value >= self.target if self.is_speedup else self.value <= self.target


def band(m: int) -> int:
    """Which column of the targets governs ``m`` rows."""
    if m <= 16:
        return SMALL
    if m <= 64:
        return MEDIUM
    if m <= 256:
        return LARGE
    return BETWEEN if m < 1024 else HUGE


def ratio(competitor: Competitor, m: int, times: Sums) -> Ratio | None:
    """The ratio for one of our competitors; None where it, or everyone it is compared with, was not measured."""
    ours = times.get((competitor.key, m))
    rivals = [(times[rival.key, m], rival.label) for rival in _rivals(competitor, m) if (rival.key, m) in times]
    if ours is None or not rivals:
        return None
    best, label = min(rivals)
    is_speedup = competitor.family != "mixed" and band(m) in (SMALL, MEDIUM)
    return Ratio(best / ours if is_speedup else ours / best, label, is_speedup, TARGETS.get((competitor.key, band(m))))


def _rivals(competitor: Competitor, m: int) -> Sequence[Competitor]:
    if competitor.family == "mixed":
        return [UNIFORM[8]]
    if band(m) == HUGE:
        return [BF16]
    bits = 4 if competitor.widths[0] <= 4 else 8
    return [MARLIN[bits], MACHETE[bits], *([BF16] if band(m) in (LARGE, BETWEEN) else [])]
