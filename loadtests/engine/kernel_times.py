"""Where a decode step's time goes: what runs on the device, by name."""

from collections.abc import Mapping

Times = Mapping[str, tuple[float, float]]
"""Name of what runs on the device -> microseconds, and how often it ran."""

SHOWN = 12
"""Kernels that a table has, at most; the rest is one line."""


def per_step(short: Times, long: Times, steps: int) -> dict[str, tuple[float, float]]:
    """Per decode step, from two runs of which the long one has ``steps`` more; what takes longest comes first."""
    result = {}
    for name, (us, calls) in long.items():
        us_before, calls_before = short.get(name, (0.0, 0.0))
        if calls > calls_before:
            result[name] = ((us - us_before) / steps, (calls - calls_before) / steps)
    return dict(sorted(result.items(), key=lambda item: -item[1][0]))


def cells(times: Times) -> list[list[str]]:
    """A table of what takes longest, all else, and the sum."""
    first, rest = list(times.items())[:SHOWN], list(times.values())[SHOWN:]
    rows = [(name, us, calls) for name, (us, calls) in first]
    rows += [(f"{len(rest)} more", *_sum(rest))] if rest else []
    rows.append(("all", *_sum(list(times.values()))))
    return [["on the device", "us per step", "calls"], *([name, f"{us:.1f}", f"{calls:.1f}"] for name, us, calls in rows)]


def _sum(values: list[tuple[float, float]]) -> tuple[float, float]:
    return sum(us for us, _ in values), sum(calls for _, calls in values)
