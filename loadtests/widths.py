"""Throughput and latency of a running server at each precision: ``python -m loadtests.widths URL --tokenizer DIR``.

The load is made by vLLM's own generator, ``vllm bench serve``, once per precision with the header X-Precision; its
results stay in ``--out``, one JSON file per precision, and one table is printed.
"""

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loadtests import bench_serve

COLUMNS = {
    # Heading: the key of vLLM's result, and its format.
    "requests/s": ("request_throughput", ".2f"),
    "tokens/s": ("output_throughput", ".1f"),
    "TTFT p50 ms": ("median_ttft_ms", ".1f"),
    "TTFT p99 ms": ("p99_ttft_ms", ".1f"),
    "ms/token p50": ("median_tpot_ms", ".2f"),
    "ms/token p99": ("p99_tpot_ms", ".2f"),
    "failed": ("failed", "d"),
}


@dataclass(frozen=True)
class Load:
    """The requests of one run; the same for every precision."""

    num_prompts: int
    concurrency: int
    input_len: int
    output_len: int
    seed: int

    def options(self) -> list[str]:
        """As ``vllm bench serve`` takes it."""
        return [
            *("--dataset-name", "random", "--seed", str(self.seed)),
            *("--random-input-len", str(self.input_len), "--random-output-len", str(self.output_len)),
            *("--num-prompts", str(self.num_prompts), "--max-concurrency", str(self.concurrency)),
        ]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the load once per precision; returns 1 if any request failed."""
    parser = argparse.ArgumentParser(prog="python -m loadtests.widths", description="Load-test a running server per precision.")
    parser.add_argument("url", help="the server, such as http://localhost:8000")
    parser.add_argument("--tokenizer", required=True, help="folder with the model's tokenizer: the parent")
    parser.add_argument("--model", help="served model name (default: the first that the server lists)")
    parser.add_argument("--precisions", default="2,3,4,6,8", help="comma-separated (default: %(default)s)")
    parser.add_argument("--num-prompts", type=int, default=32, help="requests per precision (default: %(default)s)")
    parser.add_argument("--concurrency", type=int, default=8, help="requests in flight (default: %(default)s)")
    parser.add_argument("--input-len", type=int, default=64, help="prompt tokens (default: %(default)s)")
    parser.add_argument("--output-len", type=int, default=32, help="generated tokens (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the random prompts (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("loadtest"), help="folder of the results (default: %(default)s)")
    given = parser.parse_args(arguments)

    load = Load(given.num_prompts, given.concurrency, given.input_len, given.output_len, given.seed)
    given.out.mkdir(parents=True, exist_ok=True)
    results = {}
    for precision in given.precisions.split(","):
        target = given.out / f"precision-{precision}.json"
        header = f"X-Precision={precision}"
        results[precision] = bench_serve.run(given.url, given.tokenizer, given.model, header, load.options(), target)
        print(f"precision {precision}: {results[precision]['output_throughput']:.1f} tokens/s", file=sys.stderr, flush=True)
    print(table(results))
    return int(any(result["failed"] for result in results.values()))


def table(results: Mapping[str, Mapping[str, Any]]) -> str:
    """One line per precision."""
    rows = [["precision", *COLUMNS]]
    rows += [[name, *(format(result[key], spec) for key, spec in COLUMNS.values())] for name, result in results.items()]
    return bench_serve.aligned(rows)


if __name__ == "__main__":
    sys.exit(main())
