"""What was measured as a table, with the ratios that are aimed at."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from loadtests.engine.kernel_times import Times
from loadtests.engine.variants import OURS, OURS_COMMON

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Target:
    """A row compared with the best of others: how many times faster it must be."""

    row: str
    rivals: tuple[str, ...]
    at_least: float
    batches: tuple[int, ...] | None
    """Decode batches, or None for prefill."""

    @property
    def label(self) -> str:
        what = "prefill" if self.batches is None else "batch " + ", ".join(map(str, self.batches))
        return f"{self.row} against {' or '.join(self.rivals)}, {what}"


FOUR_BIT = ("w4-machete", "w4-marlin")
TARGETS = tuple(
    target
    for ours in (OURS, OURS_COMMON)
    for target in (
        Target(f"{ours} 4", FOUR_BIT, 1.15, (1, 8, 32)),
        Target(f"{ours} 4", FOUR_BIT, 1.0, (128, 256)),
        Target(f"{ours} 8", ("w8-machete",), 1.0, (1, 8, 32, 128, 256)),
        Target(f"{ours} 2", FOUR_BIT, 1.25, (1, 8)),
        Target(f"{ours} mix48", (f"{ours} 8",), 1 / 1.15, (8, 32, 128, 256)),
        *(Target(f"{ours} {width}", ("bf16",), 0.95, None) for width in (2, 3, 4, 6, 8)),
    )
)


def rows(results: Sequence[Mapping[str, Any]]) -> dict[str, Row]:
    """All rows of all engines, by name."""
    return {row["name"]: row for result in results for row in result["rows"]}


def profiles(results: Sequence[Mapping[str, Any]]) -> list[tuple[str, str, Times]]:
    """(row, batch, what a step runs on the device), where that was asked."""
    return [(name, batch, times) for name, row in rows(results).items() for batch, times in row.get("kernels", {}).items()]


def batches(found: Mapping[str, Row]) -> list[int]:
    """Batches that any row has."""
    return sorted({int(batch) for row in found.values() for batch in row["decode_ms"]})


def speed_ratio(found: Mapping[str, Row], target: Target) -> float | None:
    """How many times as fast as the best rival, at the batch where that is least; None if something was not measured."""
    rivals = [found[name] for name in target.rivals if name in found]
    if target.row not in found or not rivals:
        return None
    if target.batches is None:
        return float(found[target.row]["prefill_tokens_per_s"] / max(rival["prefill_tokens_per_s"] for rival in rivals))
    ratios = []
    for batch in map(str, target.batches):
        held = [rival["decode_ms"][batch] for rival in rivals if batch in rival["decode_ms"]]
        if held and batch in found[target.row]["decode_ms"]:
            ratios.append(min(held) / found[target.row]["decode_ms"][batch])
    return min(ratios, default=None)


def cells(results: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """Heading, then a line per row: milliseconds per decode step, and to the first token of prompts alone, prefill, weights in
    GiB, seconds to start."""
    found = rows(results)
    columns = batches(found)
    prompts = list(dict.fromkeys(tokens for row in found.values() for tokens in row.get("alone_ms", {})))
    heading = ["engine", *(f"b{batch} ms" for batch in columns), *(f"{tokens} tokens ms" for tokens in prompts)]
    lines = [[*heading, "prefill tok/s", "weights GiB", "start s"]]
    for result in results:
        for row in result["rows"]:
            times = [row["decode_ms"].get(str(batch)) for batch in columns]
            times += [row.get("alone_ms", {}).get(tokens) for tokens in prompts]
            lines.append(
                [
                    row["name"],
                    *("" if time is None else f"{time:.2f}" for time in times),
                    f"{row['prefill_tokens_per_s']:.0f}",
                    f"{result['weight_bytes'] / 2**30:.2f}",
                    f"{result['start_s']:.0f}",
                ]
            )
    return lines


def ratio_cells(results: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """Heading, then a line per target of which both sides were measured."""
    found = rows(results)
    lines = [["speed", "least ratio", "wanted", "met"]]
    for target in TARGETS:
        ratio = speed_ratio(found, target)
        if ratio is not None:
            lines.append([target.label, f"{ratio:.2f}", f"{target.at_least:.2f}", "yes" if ratio >= target.at_least else "no"])
    return lines


def markdown(results: Sequence[Mapping[str, Any]]) -> str:
    """The whole report."""
    first = results[0]
    plan = first["plan"]
    parts = [
        "# Engine speed\n",
        f"{first['device']}, vLLM {first['vllm']}, torch {first['torch']}. Random weights, bfloat16 activations, "
        f"prompts of {plan['prompt_len']} tokens, {plan['tokens']} decode steps timed, prefill of prompts of "
        f"{plan['prefill_len']} tokens, median of {plan['repeats']} runs; "
        f"{'eager' if plan['eager'] else 'CUDA graphs'}. One engine after the other.\n",
        _table(cells(results)),
    ]
    ratios = ratio_cells(results)
    if len(ratios) > 1:
        parts += ["Times as fast as the best of its rivals, at the batch where that is least:\n", _table(ratios)]
    return "\n".join(parts)


def _table(lines: Sequence[Sequence[str]]) -> str:
    divided = [lines[0], ["---"] * len(lines[0]), *lines[1:]]
    return "\n".join("| " + " | ".join(line) + " |" for line in divided) + "\n"
