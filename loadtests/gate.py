"""The regression gate: is any number of this report worse than an earlier report's by more than is allowed?"""

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loadtests.campaign import TESTED
from matgptq_vllm.core.errors import FormatError, InputError

MORE_IS_BETTER = ("requests_per_s", "tokens_per_s", "goodput_per_s")
LESS_IS_BETTER = ("ttft.p50", "ttft.p90", "itl.p50", "itl.p90", "e2e.p50", "e2e.p90")
"""The 99th percentile is reported but not gated: of the few hundred requests of a run it is a handful of requests."""

Key = tuple[str, str, int]
"""Precision, rate and concurrency."""


@dataclass(frozen=True)
class Regression:
    """One number that is worse than it was."""

    cell: str
    number: str
    before: float
    now: float
    worse: float
    """By which share."""

    def __str__(self) -> str:
        return f"{self.cell}: {self.number} was {self.before:.4g} and is {self.now:.4g}, {self.worse:.1%} worse"


def read_report(path: Path) -> dict[str, Any]:
    """The report of an earlier load test; FormatError if the file is none."""
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
        numbers_of(report)
    except (KeyError, TypeError, ValueError) as error:
        raise FormatError(f"{path} is not a report of `matgptq loadtest` ({error!r}); name its report.json") from None
    return report


def numbers_of(report: Mapping[str, Any]) -> dict[Key, dict[str, float]]:
    """Of every cell, the median over the repeats of every gated number. Interrupted runs do not count."""
    groups: dict[Key, list[Mapping[str, Any]]] = {}
    for run in report["runs"]:
        if run["server"] == TESTED and not run["partial"]:
            groups.setdefault((run["precision"], run["rate"], run["concurrency"]), []).append(run["summary"])
    found: dict[Key, dict[str, float]] = {}
    for key, summaries in groups.items():
        found[key] = {}
        for number in (*MORE_IS_BETTER, *LESS_IS_BETTER):
            first, _, second = number.partition(".")
            values = [summary[first][second] if second else summary[first] for summary in summaries]
            values = [value for value in values if value is not None]
            if values:
                found[key][number] = statistics.median(values)
    return found


def regressions(report: Mapping[str, Any], baseline: Mapping[str, Any], allowed: float) -> list[Regression]:
    """Numbers that are worse than the baseline's by more than the share ``allowed``.

    Raises:
        InputError: the two are of different loads, or have no run in common.
    """
    for name in ("workload", "slo"):
        if report["load"][name] != baseline["load"][name]:
            raise InputError(
                f"the baseline's {name} is {baseline['load'][name]}, that of this test {report['load'][name]}: "
                "numbers of different loads do not compare; repeat the baseline with the same options"
            )
    now, before = numbers_of(report), numbers_of(baseline)
    common = [key for key in now if key in before]
    if not common:
        raise InputError("the baseline has no finished run at the precisions, rates and concurrencies of this test")
    found = []
    for key in common:
        cell = f"precision {key[0]}, rate {key[1]}, {key[2]} in flight"
        for number, old in before[key].items():
            new = now[key].get(number)
            worse = _worse(number, old, new)
            if worse > allowed:
                found.append(Regression(cell, number, old, float("nan") if new is None else new, worse))
    return found


def _worse(number: str, before: float, now: float | None) -> float:
    """By which share; a number that is gone is as bad as can be."""
    if now is None:
        return float("inf")
    if before <= 0:
        return 0.0
    return 1 - now / before if number in MORE_IS_BETTER else now / before - 1


def text(found: Sequence[Regression], allowed: float) -> str:
    """The verdict, for people."""
    if not found:
        return f"no number is worse than the baseline's by more than {allowed:.1%}"
    return "\n".join([f"worse than the baseline by more than {allowed:.1%}:", *(f"  {one}" for one in found)])
