"""``python -m loadtests.simulation.recorded TIMELINE RECORDS``: what an oracle would have made of a real load test.

The requests of a run, as they came and as long as they were, are served again by a simulated engine. Its steps take what the
server itself learned of its steps, at the speed that the machine had in that second (``loadtests.simulation.speeds``). There
the oracle finds its plan, and the controller and every fixed width are tried. How often width 8 meets the budget in the
simulation can be compared with a real run at that width.
"""

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from loadtests.records import COMPLETED, Record, read_records
from loadtests.simulation.compare import Outcome, outcome, runs_of
from loadtests.simulation.engine import WIDTHS, Hardware
from loadtests.simulation.policies import PROFILES, Controlled
from loadtests.simulation.speeds import SECONDS, interpolated, speeds_of, widths_of
from loadtests.simulation.trace import Arrival
from loadtests.tables import aligned
from matgptq_vllm.core.errors import InputError
from serve.budget import Budget
from serve.outlook import MAX_PROMPT_SHARE

SEED = 0
"""Of the noise."""

NOISE = 0.03
"""Of single steps, in addition to the speed of the second."""


@dataclass(frozen=True)
class Fitted(Hardware):
    """An engine whose steps take what a server's latency model says."""

    prompt_tokens: tuple[float, ...] = ()
    """Milliseconds per prompt token at each of WIDTHS."""

    speeds: tuple[float, ...] = ()
    """By how much longer steps take in each SECONDS of the run."""

    @classmethod
    def of(cls, model: Mapping[str, Any], max_running: int, max_batched_tokens: int) -> "Fitted":
        """The engine behind ``latency_model`` of ``GET /v1/precisions``."""
        known = model["coefficients"]
        read, token, prompt = (tuple(known[kind][name] for name in PROFILES) for kind in ("fixed", "decode", "prefill"))
        return cls(
            "fitted", known["base"], read, token, 1.0, 0.0, known["context"], NOISE, 0.0,
            max_running=max_running, max_batched_tokens=max_batched_tokens, prompt_tokens=prompt,
            # Servers of before knew no such cost.
            prompts=known.get("prompts", 0.0),
        )  # fmt: skip

    def step_ms(self, decode: Sequence[int], prefill: Sequence[float], context: int, at_s: float) -> float:
        """Without noise; the formula of ``serve.latency_model``, at the speed of the moment."""
        total = self.common_ms(prefill, context)
        for width, (sequences, prompts) in enumerate(zip(decode, prefill, strict=True)):
            if sequences or prompts:
                total += self.read[width] + self.token[width] * sequences + self.prompt_tokens[width] * prompts
        return total * (self.speeds[min(int(at_s / SECONDS), len(self.speeds) - 1)] if self.speeds else 1.0)

    def token_ms(self, width: float, sequences: float, context: float, prompts_per_s: float, prompt_tokens: float) -> float:
        """Mean milliseconds per token while prompts come in between; ``width`` may lie between two of WIDTHS."""

        def at(index: int) -> float:
            step = self.base + self.read[index] + self.token[index] * sequences + self.context * context
            prompt = self.prompts + self.prompt_tokens[index] * prompt_tokens
            return step / (1 - min(prompts_per_s * prompt / 1e3, MAX_PROMPT_SHARE))

        return interpolated(width, WIDTHS, [at(index) for index in range(len(WIDTHS))])

    def at_speeds_of(self, records: Sequence[Record], samples: Sequence[Mapping[str, Any]]) -> "Fitted":
        """The same engine on the machine as it was while ``records`` were made and ``samples`` taken."""
        runs = [record for record, _ in counted(records)]
        each = sum(record.input_tokens + record.output_tokens / 2 for record in runs) / max(1, len(runs))

        def predicted(width: float, sequences: float, prompts_per_s: float, prompt_tokens: float) -> float:
            return self.token_ms(width, sequences, each * sequences, prompts_per_s, prompt_tokens)

        return replace(self, speeds=speeds_of(runs, samples, predicted))


def counted(records: Sequence[Record]) -> list[tuple[Record, float]]:
    """The requests of a run that were completed and have a time per token, in order of time, with that time in seconds."""
    found = [(record, record.tpot_s) for record in records if record.outcome == COMPLETED and record.tpot_s is not None]
    return sorted(found, key=lambda one: one[0].due_s)


def arrivals_of(records: Sequence[Record]) -> list[Arrival]:
    """The requests of a run that count, as they came."""
    return [
        Arrival(number, record.due_s, record.input_tokens, record.output_tokens, False)
        for number, (record, _) in enumerate(counted(records))
    ]


def measured(records: Sequence[Record], samples: Sequence[Mapping[str, Any]], tpot_ms: float) -> tuple[float, float]:
    """(share of requests within ``tpot_ms``, mean width over their decoded tokens) of a real run; InputError without samples.

    The server's own counts would have the requests of the warm-up in them.
    """
    found = counted(records)
    width_at = widths_of([record for record, _ in found], samples)
    if not found or width_at is None:
        raise InputError("no request was completed, or no sample of the timeline has a width; record a run that has both")
    within = [tpot_s * 1e3 <= tpot_ms for _, tpot_s in found]
    widths = []
    for record, _ in found:
        at_s = record.start_s + record.ttft_s
        for gap_s in record.gaps_s:
            # Of the step that ended with the token.
            widths.append(width_at(at_s + gap_s / 2))
            at_s += gap_s
    return sum(within) / len(within), sum(widths) / len(widths)


def simulate(records: Sequence[Record], hardware: Fitted, tpot_ms: float) -> dict[str, Outcome]:
    """Every fixed width, and the controller and the oracle, whom running requests follow."""
    # The first seconds of the run stand for those before it, in which the server swept.
    controlled = Controlled(hardware, Budget(tpot_ms), SEED, True, sweep_lasts=True)
    runs = runs_of(arrivals_of(records), hardware, controlled, tpot_ms, SEED, True)
    return {name: outcome(run, tpot_ms) for name, run in runs.items()}


def main(arguments: Sequence[str] | None = None) -> int:
    """Compare a recorded run with the oracle; prints a table."""
    parser = argparse.ArgumentParser(
        prog="python -m loadtests.simulation.recorded",
        description="What an oracle would have served in a load test, from what loadtests.timeline and matgptq loadtest wrote.",
    )
    parser.add_argument("timeline", type=Path, help="timeline.json, written with --budget-ms")
    parser.add_argument("records", type=Path, help="records of one run, such as report/runs/000.jsonl")
    parser.add_argument("--max-num-seqs", type=int, default=256, help="of the server (default: %(default)s)")
    parser.add_argument("--max-num-batched-tokens", type=int, default=2048, help="of the server (default: %(default)s)")
    parser.add_argument("--out", type=Path, help="file for the numbers, as JSON")
    given = parser.parse_args(arguments)
    timeline = json.loads(given.timeline.read_text(encoding="utf-8"))
    tpot_ms, model = timeline["budget_ms"], timeline["latency_model"]
    if tpot_ms is None or model["mean_error"] is None or set(model["coefficients"]["fixed"]) < set(PROFILES):
        parser.error(
            f"{given.timeline} needs a budget (--budget-ms) and a latency model of the widths {', '.join(PROFILES)}; "
            "run loadtests.timeline against a server that holds them"
        )
    records = read_records(given.records)
    try:
        met, width = measured(records, timeline["samples"], tpot_ms)
    except InputError as error:
        parser.error(str(error))
    hardware = Fitted.of(model, given.max_num_seqs, given.max_num_batched_tokens)
    found = simulate(records, hardware.at_speeds_of(records, timeline["samples"]), tpot_ms)
    rows = [["", "met", "mean width"], ["measured", f"{met:.1%}", f"{width:.2f}"]]
    rows += [[f"simulated: {name}", f"{one.met:.1%}", f"{one.width_tokens:.2f}"] for name, one in found.items()]
    share = width / found["oracle"].width_tokens
    print(f"{aligned(rows)}\nmean width measured, of the oracle's: {share:.0%}")
    if given.out is not None:
        document = {
            "tpot_ms": tpot_ms,
            "measured": {"met": met, "width_tokens": width},
            "simulated": {name: asdict(one) for name, one in found.items()},
            "width_of_oracle": share,
        }
        given.out.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
