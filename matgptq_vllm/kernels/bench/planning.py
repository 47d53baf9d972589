"""Numbers for planning: memory, speed and cost of models at every width on one GPU.

``python -m matgptq_vllm.kernels.bench.planning docs/results/kernels-h200/results.json`` prints a table in Markdown. A step of
decoding is the time of its matrix products, measured where the results have the model and scaled by its weights where they do
not, and the time to read the KV cache and the output layer at the measured speed of a copy. What lies between the kernels is
left out, so speeds are upper bounds until a load test measured them; ``--load-test MODEL=report.json`` puts those in.
"""

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matgptq_vllm.core.errors import FormatError, InputError, MatGPTQError
from matgptq_vllm.core.precision import WIDTHS
from matgptq_vllm.kernels.bench.shapes import MODELS

LAYERS_AND_VOCABULARY = {
    "llama-3.1-8b": (32, 128256),
    "qwen3-14b": (40, 151936),
    "qwen3-32b": (64, 151936),
    "llama-3.1-70b": (80, 128256),
}
"""Of the models in the table, from their config.json; all have an output layer of their own."""

MEASURED, MODELLED, LOADED = "products measured", "products modelled", "load test"

BYTES = 2
"""Of a value in bfloat16."""


@dataclass(frozen=True)
class Gpu:
    """What a replica runs on."""

    memory_bytes: float
    usable: float
    """Share of the memory for weights and KV cache."""


@dataclass(frozen=True)
class Plan:
    """One model at one width on one GPU."""

    model: str
    width: int
    weight_bytes: float
    """Planes, scales, embedding and output layer."""
    sequences: int
    """Of the given context that the KV cache has room for."""
    step_s: float
    tokens_per_s: float
    """With the given batch."""
    source: str
    """Where the speed comes from: MEASURED, MODELLED or LOADED."""

    @property
    def gpu_hours(self) -> float:
        """Per million generated tokens."""
        return 1e6 / self.tokens_per_s / 3600


def plan(
    model: str, width: int, batch: int, context: int, gpu: Gpu, results: Mapping[str, Any], loaded: float | None = None
) -> Plan:
    """One row of the table.

    Args:
        model: a key of LAYERS_AND_VOCABULARY.
        batch: sequences that decode together, one of the M of ``results``.
        context: tokens of each, prompt and answer.
        results: the kernel benchmark's ``results.json``.
        loaded: generated tokens per second that a load test measured; None: none was.
    """
    layers, vocabulary = LAYERS_AND_VOCABULARY[model]
    qkv, output, *_ = MODELS[model]
    block_weights = sum(shape.num_weights for shape in MODELS[model])
    # q, k and v are one product: what it has beyond the inputs of the output projection are keys and values.
    kv_bytes = (qkv.n - output.k) * BYTES * layers
    head_bytes = vocabulary * qkv.k * BYTES
    weight_bytes = layers * block_weights * (width / 8 + BYTES / results["group_size"]) + 2 * head_bytes
    per_block_s, source = _products_s(model, width, batch, block_weights, results)
    # A copy reads and writes: as fast as its bytes in all.
    bandwidth = results["device"]["copy_bytes_per_s"]
    step_s = layers * per_block_s + (head_bytes + batch * context * kv_bytes) / bandwidth
    room = gpu.memory_bytes * gpu.usable - weight_bytes
    tokens_per_s = batch / step_s
    if loaded is not None:
        tokens_per_s, source = loaded, LOADED
    return Plan(
        model, width, weight_bytes, max(0, int(room // (context * kv_bytes))), batch / tokens_per_s, tokens_per_s, source
    )


def _products_s(model: str, width: int, batch: int, weights: int, results: Mapping[str, Any]) -> tuple[float, str]:
    """Seconds of one block's products, and whether they are of this model."""
    at = [cell for cell in results["cells"] if cell["m"] == batch]
    # Batches of one width have graphs of their own, which run the kernels of a replica that holds no other.
    cells = [cell for cell in at if cell["competitor"] == f"alone-{width}"]
    cells = cells or [cell for cell in at if cell["competitor"] == f"width-{width}"]
    own = [cell for cell in cells if cell["model"] == model]
    if own:
        return sum(cell["us"] for cell in own) / 1e6, MEASURED
    if not cells:
        measured = sorted({cell["m"] for cell in results["cells"]})
        raise InputError(f"--batch {batch} was not measured at width {width}; the results have {', '.join(map(str, measured))}")
    return sum(cell["us"] for cell in cells) / 1e6 * weights / sum(cell["n"] * cell["k"] for cell in cells), MODELLED


def loaded_speeds(report: Mapping[str, Any], batch: int) -> dict[int, float]:
    """Generated tokens per second by width, of a load test's runs at rate inf with ``batch`` requests in flight."""
    return {
        int(run["precision"]): run["summary"]["tokens_per_s"]
        for run in report["runs"]
        if run["precision"].isdigit() and run["rate"] == "inf" and run["concurrency"] == batch and not run["partial"]
    }


def table(plans: Sequence[Plan]) -> str:
    """In Markdown."""
    lines = [
        "| model | width | weights, GB | sequences that fit | ms per step | tokens/s | GPU h per million tokens | speed from |",
        "|---|--:|--:|--:|--:|--:|--:|---|",
    ]
    lines += [
        f"| {one.model} | {one.width} | {one.weight_bytes / 1e9:.1f} | {one.sequences} | {1e3 * one.step_s:.1f} "
        f"| {one.tokens_per_s:.0f} | {one.gpu_hours:.3f} | {one.source} |"
        for one in plans
    ]
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table; returns 2 for wrong input."""
    parser = argparse.ArgumentParser(prog="python -m matgptq_vllm.kernels.bench.planning", description=__doc__)
    parser.add_argument("results", type=Path, help="results.json of the kernel benchmark on that GPU")
    parser.add_argument("--batch", type=int, default=32, help="sequences that decode together (default: %(default)s)")
    parser.add_argument("--context", type=int, default=2048, help="tokens of each sequence (default: %(default)s)")
    parser.add_argument("--memory-gb", type=float, default=141, help="of the GPU (default: %(default)s)")
    parser.add_argument("--usable", type=float, default=0.9, help="share of it that vLLM uses (default: %(default)s)")
    parser.add_argument("--load-test", action="append", default=[], metavar="MODEL=FILE", help="report.json of a load test")
    given = parser.parse_args(arguments)
    try:
        results = _read(given.results, "cells")
        loads: dict[str, dict[int, float]] = {}
        for text in given.load_test:
            model, _, file = text.partition("=")
            if model not in LAYERS_AND_VOCABULARY or not file:
                raise InputError(f"--load-test {text!r} is not MODEL=FILE with a model of {', '.join(LAYERS_AND_VOCABULARY)}")
            loads[model] = loaded_speeds(_read(Path(file), "runs"), given.batch)
        gpu = Gpu(given.memory_gb * 1e9, given.usable)
        plans = [
            plan(model, width, given.batch, given.context, gpu, results, loads.get(model, {}).get(width))
            for model in LAYERS_AND_VOCABULARY
            for width in sorted(WIDTHS, reverse=True)
        ]
    except (MatGPTQError, OSError) as error:
        print(f"planning: {error}", file=sys.stderr)
        return 2
    print(table(plans))
    return 0


def _read(path: Path, key: str) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise FormatError(f"{path} is not JSON: {error}") from None
    if not isinstance(found, dict) or key not in found:
        raise FormatError(f"{path} has no {key!r}; it is not the file that is expected here")
    return found


if __name__ == "__main__":
    sys.exit(main())
