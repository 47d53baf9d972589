"""python -m matgptq_vllm.kernels.bench.cpu: time the sliced products on this machine's CPU, one core, against the oracle.

"Before" is ``kernels.reference``, plain torch on the whole layer; "after" is ``kernels.cpu``. Both take turns in one process,
and the fastest round counts, in CPU time, so that other programs on the machine disturb little.
"""

import argparse
import sys
import time
from collections.abc import Callable, Sequence

import torch

from matgptq_vllm.core.errors import InputError, MatGPTQError
from matgptq_vllm.core.planes import PlaneLayout
from matgptq_vllm.core.precision import WIDTHS
from matgptq_vllm.core.slicing import SliceRule, bits_read, check_rule, num_groups
from matgptq_vllm.kernels import cpu, reference
from matgptq_vllm.kernels.bench.shapes import BlockDims, GemmShape

GROUP_SIZE = 128
SHAPES = {
    "7m": BlockDims(256, 4, 2, 768, head_dim=64).shapes(),
    "42m": BlockDims(512, 8, 4, 1536, head_dim=64).shapes(),
    "4096": (GemmShape("square", 4096, 4096),),
}
"""Name on the command line: the products of one block of the example models, and one layer of a large one."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Print a Markdown table; returns the exit status (2: wrong input)."""
    parser = argparse.ArgumentParser(
        prog="python -m matgptq_vllm.kernels.bench.cpu",
        description="Time the sliced products on one core of this CPU: milliseconds per layer, before / after.",
    )
    parser.add_argument("--shapes", default=",".join(SHAPES), help="some of %(default)s")
    parser.add_argument("--m", default="1,8,32", help="rows of a batch; default %(default)s")
    parser.add_argument("--rule", default="curved", help="slice rule; default %(default)s")
    parser.add_argument("--rounds", type=int, default=15, help="timed calls of each; default %(default)s")
    given = parser.parse_args(arguments)
    try:
        rule = check_rule(given.rule)
        shapes = [shape for name in given.shapes.split(",") for shape in _shapes(name)]
        ms = [_rows(text) for text in given.m.split(",")]
        if given.rounds < 1:
            raise InputError(f"--rounds {given.rounds} times nothing; use 1 or more")
    except MatGPTQError as error:
        print(f"matgptq_vllm.kernels.bench.cpu: error: {error}", file=sys.stderr)
        return 2
    torch.set_num_threads(1)
    print("| layer (N x K) | M | " + " | ".join(f"width {width}" for width in WIDTHS) + " |")
    print("|---|---|" + "---|" * len(WIDTHS))
    for shape in shapes:
        for m in ms:
            cells = [_milliseconds(shape, m, width, rule, given.rounds) for width in WIDTHS]
            row = " | ".join(f"{before:.2f} / {after:.2f}" for before, after in cells)
            print(f"| {shape.layer} ({shape.n} x {shape.k}) | {m} | {row} |", flush=True)
    return 0


def _milliseconds(shape: GemmShape, m: int, width: int, rule: SliceRule, rounds: int) -> tuple[float, float]:
    """Fastest call before and after, bfloat16 activations."""
    layout = PlaneLayout()
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 256, (shape.n, shape.k), dtype=torch.uint8, generator=generator)
    planes = layout.split(codes)[: layout.num_planes(bits_read(width, rule))]
    scales = (torch.rand(shape.n, num_groups(shape.k, GROUP_SIZE), generator=generator) * 0.02).bfloat16()
    x = torch.randn(m, shape.k, generator=generator).bfloat16()
    row_widths = torch.full((m,), width, dtype=torch.int32)

    def before() -> torch.Tensor:
        return reference.sliced_linear(x, planes, scales, row_widths, [width], layout, GROUP_SIZE, rule)

    def after() -> torch.Tensor:
        return cpu.sliced_linear(x, planes, scales, row_widths, layout, GROUP_SIZE, rule)

    fastest = [float("inf")] * 2
    with torch.inference_mode():
        for _ in range(rounds + 1):
            fastest = [min(best, _seconds(product)) for best, product in zip(fastest, (before, after), strict=True)]
    return fastest[0] * 1e3, fastest[1] * 1e3


def _seconds(product: Callable[[], torch.Tensor]) -> float:
    """CPU time of one call; all of it is this thread's."""
    start = time.thread_time()
    product()
    return time.thread_time() - start


def _shapes(name: str) -> tuple[GemmShape, ...]:
    if name not in SHAPES:
        raise InputError(f"shapes {name!r} are unknown; use some of {', '.join(SHAPES)}")
    return SHAPES[name]


def _rows(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise InputError(f"--m {text!r} is not a number of rows; use whole numbers from 1, separated by commas")
    return int(text)


if __name__ == "__main__":
    sys.exit(main())
