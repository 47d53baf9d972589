"""Decode and prefill speed of this project's engine beside stock vLLM's: ``python -m loadtests.engine --out DIR``.

Engines are measured one after the other, each in a process of its own, with random weights of one architecture. All widths are
measured in one engine. With ``--together`` all start at once, where the GPU has room for them, and wait for their turns.
Every engine's result stays in ``--out`` as soon as it is there; a later run of other variants with the same ``--out`` adds to
the report.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from loadtests import tables
from loadtests.engine import kernel_times, plot, processes, report
from loadtests.engine.folders import write_parent, write_peer
from loadtests.engine.measure import Plan
from loadtests.engine.shapes import SHAPES, Shape
from loadtests.engine.variants import PEERS, VARIANTS, precisions
from matgptq_vllm.core.errors import InputError
from matgptq_vllm.core.parent import SLICE_RULE_NAMES
from matgptq_vllm.core.precision import check_width


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and report; returns 1 if an engine failed, 2 if the options are wrong."""
    given = _parser().parse_args(arguments)
    try:
        plans = {variant: _plan(variant, given) for variant in given.variants.split(",")}
    except InputError as error:
        print(f"loadtests: {error}", file=sys.stderr)
        return 2
    given.out.mkdir(parents=True, exist_ok=True)
    failed = 0
    for group in [plans] if given.together else [{variant: plan} for variant, plan in plans.items()]:
        for variant, plan in group.items():
            _write_folder(SHAPES[given.shape], variant, given.rule, Path(plan.folder))
        failed += processes.measure(list(group.values()), given.out, given.timeout)
    results = _results(given.out, plans[next(iter(plans))])
    if results:
        (given.out / "report.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
        (given.out / "report.md").write_text(report.markdown(results), encoding="utf-8")
        plot.draw(results, given.out / "report.png")
        print(tables.aligned(report.cells(results)))
        print(tables.aligned(report.ratio_cells(results)))
        for name, batch, times in report.profiles(results):
            print(f"\n{name}, batch {batch}:\n{tables.aligned(kernel_times.cells(times))}")
    return int(failed > 0)


def _results(out: Path, plan: Plan) -> list[dict[str, Any]]:
    """Results in ``out``, in the order of the variants, that were measured by a plan like ``plan``."""
    found = []
    for variant in VARIANTS:
        path = out / f"{variant}.json"
        if path.exists():
            result = json.loads(path.read_text(encoding="utf-8"))
            same = {**asdict(plan), "variant": variant, "folder": result["plan"]["folder"], "widths": result["plan"]["widths"]}
            if json.loads(json.dumps(same)) == result["plan"]:
                found.append(result)
            else:
                print(f"{path}: measured with other options, left out", file=sys.stderr)
    return found


def _write_folder(shape: Shape, variant: str, rule: str, folder: Path) -> None:
    if variant in PEERS:
        write_peer(shape, PEERS[variant].bits, folder)
    else:
        write_parent(shape, rule, folder)


def _plan(variant: str, given: argparse.Namespace) -> Plan:
    if variant not in VARIANTS:
        raise InputError(f"variant {variant!r} is unknown; choose from {', '.join(VARIANTS)}")
    batches = tuple(_whole(text, "--batches") for text in given.batches.split(","))
    widths = tuple(given.widths.split(","))
    for name in widths:
        for precision in precisions(name):
            check_width(_whole(precision, "--widths"))
    alone = tuple(_whole(text, "--alone") for text in given.alone.split(","))
    longest = max(given.prompt_len + Plan.WARM_TOKENS + given.tokens, given.prefill_len + 1, *(tokens + 1 for tokens in alone))
    if longest > given.max_model_len:
        raise InputError(f"requests have up to {longest} tokens, --max-model-len is {given.max_model_len}; raise it")
    if given.prefill_prompts < 2:
        raise InputError(f"--prefill-prompts {given.prefill_prompts} is too few to time; use 2 or more")
    return Plan(
        variant, str(given.out.absolute() / f"model-{variant}"), batches, widths, given.tokens, given.prompt_len,
        given.prefill_len, given.prefill_prompts, alone, given.max_model_len, given.repeats, given.eager,
        SHAPES[given.shape].vocabulary, given.kv_cache_gib if given.together else None, given.profile,
    )  # fmt: skip


def _whole(text: str, option: str) -> int:
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise InputError(f"{option} has {text!r}; whole numbers from 1 are allowed, and mix48 and the like in --widths")
    return value


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m loadtests.engine", description="Speed of this engine beside stock vLLM, with random weights."
    )
    parser.add_argument("--out", type=Path, required=True, help="folder of the results")
    parser.add_argument("--shape", choices=SHAPES, default="llama-8b", help="architecture (default: %(default)s)")
    parser.add_argument("--batches", default="1,8,32,128,256", help="requests in a batch (default: %(default)s)")
    parser.add_argument(
        "--variants", default="ours,bf16,w4-machete,w4-marlin,w8-machete",
        help=f"some of {', '.join(VARIANTS)} (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--widths", default="2,3,4,6,8,mix48", help="ours; mix48 is half 4, half 8 (default: %(default)s)"
    )  # fmt: skip
    parser.add_argument("--rule", choices=SLICE_RULE_NAMES, default="curved", help="slice rule (default: %(default)s)")
    parser.add_argument("--tokens", type=int, default=128, help="decode steps to time (default: %(default)s)")
    parser.add_argument("--prompt-len", type=int, default=32, help="prompt tokens before them (default: %(default)s)")
    parser.add_argument("--prefill-len", type=int, default=2048, help="tokens of prefill prompts (default: %(default)s)")
    parser.add_argument("--prefill-prompts", type=int, default=24, help="prefill prompts (default: %(default)s)")
    parser.add_argument(
        "--alone", default="128,384,1024", help="tokens of prompts that are computed one at a time (default: %(default)s)"
    )  # fmt: skip
    parser.add_argument("--max-model-len", type=int, default=4096, help="of all engines (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=2, help="runs of which the median counts (default: %(default)s)")
    parser.add_argument("--eager", action="store_true", help="neither compile nor capture CUDA graphs")
    parser.add_argument(
        "--profile", action="store_true", help="see also what a decode step runs on the device, by torch's profiler"
    )
    parser.add_argument("--together", action="store_true", help="start all engines at once, measure one after the other")
    parser.add_argument(
        "--kv-cache-gib", type=float, default=8.0, help="KV cache of each engine with --together (default: %(default)s)"
    )
    parser.add_argument(
        "--timeout", type=float, default=400, help="seconds for an engine, or all together (default: %(default)s)"
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
