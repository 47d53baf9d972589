"""Budgets under bursts: ``python -m loadtests.bursts URL --tokenizer DIR --budget-ms 30``.

The same trace, Poisson arrivals with bursts of several times the rate, is replayed by vLLM's own generator (``vllm bench
serve``, dataset ``timed_trace``) once per policy: every request at a fixed precision, or ``auto`` with the budget. The report
has, for each policy, the share of requests whose time per output token met the budget and the mean width of the tokens.
"""

import argparse
import json
import random
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import httpx

from loadtests import bench_serve

CHUNK = 16
"""Prompt tokens per hash of the trace format."""


@dataclass(frozen=True)
class Trace:
    """Arrivals that are Poisson, at ``rate`` per second and at ``burst`` times that during bursts."""

    seconds: float
    rate: float
    burst: float
    calm_s: float
    """Mean length of the time between bursts."""
    burst_s: float
    """Mean length of a burst."""
    input_len: int
    output_len: int
    seed: int

    def arrivals(self) -> list[float]:
        """Seconds from the start, ascending."""
        chance = random.Random(self.seed)
        times: list[float] = []
        now, bursting, turn = 0.0, False, chance.expovariate(1 / self.calm_s)
        while now < self.seconds:
            gap = chance.expovariate(self.rate * (self.burst if bursting else 1))
            if now + gap < turn:
                now += gap
                times.append(now)
                continue
            # Poisson arrivals have no memory, so that the gap may be drawn anew at the new rate.
            now, bursting = turn, not bursting
            turn = now + chance.expovariate(1 / (self.burst_s if bursting else self.calm_s))
        return [time for time in times if time < self.seconds]

    def write(self, path: Path) -> int:
        """Write the trace as ``timed_trace`` reads it; returns how many requests it has."""
        arrivals = self.arrivals()
        lines = []
        for number, time in enumerate(arrivals):
            # Hashes that differ: no prompt shares a prefix with another.
            hashes = [number * 1000 + chunk for chunk in range(-(-self.input_len // CHUNK))]
            entry = {"timestamp": time, "input_length": self.input_len, "output_length": self.output_len, "hash_ids": hashes}
            lines.append(json.dumps(entry))
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
        return len(arrivals)


@dataclass(frozen=True)
class Outcome:
    """What one policy came to."""

    policy: str
    requests: int
    failed: int
    met: float
    """Share of the requests with a time per output token within the budget; a failed one is not."""
    mean_width: float
    """Of the generated tokens, by the average bits of their profiles."""
    tpot_p50_ms: float
    tpot_p95_ms: float


def main(arguments: Sequence[str] | None = None) -> int:
    """Replay the trace once per policy and print a table; returns 1 if a request failed."""
    given = _parser().parse_args(arguments)
    trace = Trace(
        given.seconds, given.rate, given.burst, given.calm_s, given.burst_s, given.input_len, given.output_len, given.seed
    )
    given.out.mkdir(parents=True, exist_ok=True)
    path = given.out / "trace.jsonl"
    total = trace.write(path)
    outcomes = []
    for policy in given.policies.split(","):
        before = tokens_by_precision(given.url)
        result = replay(given.url, given.tokenizer, given.model, policy, given.budget_ms, path, total, given.out)
        gained = {name: count - before.get(name, 0) for name, count in tokens_by_precision(given.url).items()}
        outcomes.append(outcome(policy, result, given.budget_ms, gained, average_bits(given.url)))
        print(f"{policy}: {outcomes[-1].met:.1%} met", file=sys.stderr, flush=True)
    report = {"trace": asdict(trace), "budget_ms": given.budget_ms, "policies": [asdict(found) for found in outcomes]}
    (given.out / "report.json").write_text(json.dumps(report, indent=1), encoding="utf-8")
    print(table(outcomes))
    return int(any(found.failed for found in outcomes))


def replay(
    url: str, tokenizer: str, model: str | None, policy: str, budget_ms: float, trace: Path, total: int, out: Path
) -> dict[str, Any]:
    """Replay a trace under one policy: ``auto``, or the name of a precision. Returns vLLM's detailed result."""
    header = f"X-Latency-Budget-Ms={budget_ms}" if policy == "auto" else f"X-Precision={policy}"
    options = ["--dataset-name", "timed_trace", "--dataset-path", str(trace), "--timed-trace-chunk-hash-size", str(CHUNK)]
    options += ["--num-prompts", str(total), "--save-detailed"]
    return bench_serve.run(url, tokenizer, model, header, options, out / f"{policy}.json")


def outcome(
    policy: str, result: Mapping[str, Any], budget_ms: float, tokens: Mapping[str, float], bits: Mapping[str, float]
) -> Outcome:
    """What a result of ``replay`` comes to; ``tokens`` are the generated tokens by precision, ``bits`` their widths."""
    times = sorted(1e3 * sum(gaps) / len(gaps) for gaps in result["itls"] if gaps)
    total = sum(tokens.values())
    return Outcome(
        policy,
        requests=result["completed"] + result["failed"],
        failed=result["failed"],
        met=sum(time <= budget_ms for time in times) / max(1, result["completed"] + result["failed"]),
        mean_width=sum(bits[name] * count for name, count in tokens.items()) / total if total else 0.0,
        tpot_p50_ms=_quantile(times, 0.5),
        tpot_p95_ms=_quantile(times, 0.95),
    )


def tokens_by_precision(url: str) -> dict[str, float]:
    """Generated tokens so far, from the server's metrics."""
    found: dict[str, float] = {}
    for line in httpx.get(f"{url}/metrics", timeout=30).text.splitlines():
        if line.startswith("matgptq_generation_tokens_total{"):
            name = line.partition('precision="')[2].partition('"')[0]
            found[name] = found.get(name, 0.0) + float(line.rpartition(" ")[2])
    return {name: count for name, count in found.items() if name != "unknown"}


def average_bits(url: str) -> dict[str, float]:
    """Width of each precision that the server holds."""
    return {entry["id"]: entry["average_bits"] for entry in httpx.get(f"{url}/v1/precisions", timeout=30).json()["data"]}


def table(outcomes: Sequence[Outcome]) -> str:
    """One line per policy."""
    rows = [["policy", "requests", "met", "mean width", "ms/token p50", "ms/token p95", "failed"]]
    for found in outcomes:
        times = [f"{found.tpot_p50_ms:.1f}", f"{found.tpot_p95_ms:.1f}"]
        rows.append(
            [found.policy, str(found.requests), f"{found.met:.1%}", f"{found.mean_width:.2f}", *times, str(found.failed)]
        )
    return bench_serve.aligned(rows)


def _quantile(ordered: Sequence[float], share: float) -> float:
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else float("nan")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m loadtests.bursts", description="Replay bursts against a running server, per policy."
    )
    parser.add_argument("url", help="the server, such as http://localhost:8000")
    parser.add_argument("--tokenizer", required=True, help="folder with the model's tokenizer: the parent")
    parser.add_argument("--model", help="served model name (default: the first that the server lists)")
    parser.add_argument("--budget-ms", type=float, required=True, help="milliseconds per output token")
    parser.add_argument("--policies", default="8,auto", help="precisions, or auto; comma-separated (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=120, help="length of the trace (default: %(default)s)")
    parser.add_argument("--rate", type=float, default=1.0, help="requests per second between bursts (default: %(default)s)")
    parser.add_argument("--burst", type=float, default=5.0, help="times the rate in a burst (default: %(default)s)")
    parser.add_argument("--calm-s", type=float, default=20, help="mean seconds between bursts (default: %(default)s)")
    parser.add_argument("--burst-s", type=float, default=10, help="mean seconds of a burst (default: %(default)s)")
    parser.add_argument("--input-len", type=int, default=32, help="prompt tokens (default: %(default)s)")
    parser.add_argument("--output-len", type=int, default=64, help="generated tokens (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the trace (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("bursts"), help="folder of the results (default: %(default)s)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
