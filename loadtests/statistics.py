"""From the records of a run to its numbers: throughput, latencies, goodput, errors."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from loadtests.objectives import Objectives, first_token_s
from loadtests.records import CANCELLED, COMPLETED, FAILED, INTERRUPTED, REFUSED, Record

PERCENTILES = (50, 90, 99)


@dataclass(frozen=True)
class Quantiles:
    """Of a latency, in milliseconds; None: there was nothing to measure."""

    mean: float | None
    p50: float | None
    p90: float | None
    p99: float | None


@dataclass(frozen=True)
class Summary:
    """Numbers of one run, or of the requests of one precision in it. Latencies are those of completed requests."""

    requests: int
    completed: int
    failed: int
    cancelled: int
    refused: int
    interrupted: int
    duration_s: float
    """From when the first request was due to the end of the last."""
    requests_per_s: float
    """Completed."""
    tokens_per_s: float
    """Generated."""
    total_tokens_per_s: float
    """Prompt and generated."""
    goodput_per_s: float
    """Completed requests that met the objectives."""
    good_share: float | None
    """Of all requests but those that were cancelled or malformed on purpose; None: there were no others."""
    mean_width: float | None
    """Bits, over the generated tokens; None: unknown."""
    ttft: Quantiles
    """Time to the first token, from when the request was due."""
    itl: Quantiles
    """Between one token and the next, over all gaps of all requests."""
    tpot: Quantiles
    """Mean time per token after the first, over the requests."""
    e2e: Quantiles
    """To the last token, from when the request was due."""
    errors: dict[str, int]
    """How often, by the last line of the message."""
    tokens: dict[str, int]
    """Generated, by precision."""


def summarize(records: Sequence[Record], objectives: Objectives, bits: Mapping[str, float], duration_s: float) -> Summary:
    """What ``records`` come to; ``bits`` are the widths of the precisions, as far as they are known."""
    outcomes = Counter(record.outcome for record in records)
    completed = [record for record in records if record.outcome == COMPLETED]
    good = sum(objectives.met(record) for record in completed)
    judged = len(completed) + outcomes[FAILED]
    tokens: Counter[str] = Counter()
    for record in completed:
        tokens[record.precision] += record.output_tokens
    total = sum(tokens.values())
    known = total > 0 and all(name in bits for name in tokens)
    # A run of one moment has a rate all the same.
    seconds = max(duration_s, 1e-9)
    return Summary(
        requests=len(records),
        completed=len(completed),
        failed=outcomes[FAILED],
        cancelled=outcomes[CANCELLED],
        refused=outcomes[REFUSED],
        interrupted=outcomes[INTERRUPTED],
        duration_s=duration_s,
        requests_per_s=len(completed) / seconds,
        tokens_per_s=total / seconds,
        total_tokens_per_s=(total + sum(record.input_tokens for record in completed)) / seconds,
        goodput_per_s=good / seconds,
        good_share=good / judged if judged else None,
        mean_width=sum(bits[name] * count for name, count in tokens.items()) / total if known else None,
        ttft=quantiles([first_token_s(record) for record in completed]),
        itl=quantiles([gap for record in completed for gap in record.gaps_s]),
        tpot=quantiles([record.tpot_s for record in completed if record.tpot_s is not None]),
        e2e=quantiles([record.end_s - record.due_s for record in completed]),
        errors=dict(Counter(reason(record) for record in records if record.outcome == FAILED)),
        tokens=dict(tokens),
    )


def duration_s(records: Sequence[Record]) -> float:
    """From when the first request was due to the end of the last; 0 if there is none."""
    return max(record.end_s for record in records) - min(record.due_s for record in records) if records else 0.0


def by_precision(records: Sequence[Record]) -> dict[str, list[Record]]:
    """The records by the precision that they were computed at."""
    found: dict[str, list[Record]] = {}
    for record in sorted(records, key=lambda record: record.precision):
        found.setdefault(record.precision, []).append(record)
    return found


def reason(record: Record) -> str:
    """Why a request failed, in one line."""
    last = record.error.splitlines()[-1] if record.error else "no message"
    return f"{record.status}: {last}" if record.status is not None and record.status != 200 else last


def quantiles(seconds: Sequence[float]) -> Quantiles:
    """Mean and percentiles, in milliseconds."""
    if not seconds:
        return Quantiles(None, None, None, None)
    milliseconds = 1e3 * np.asarray(seconds, dtype=np.float64)
    return Quantiles(float(milliseconds.mean()), *(float(value) for value in np.percentile(milliseconds, PERCENTILES)))
