"""Which configurations are worth measuring for a product: two rounds, so that not every combination has to be compiled."""

from collections.abc import Iterable
from dataclasses import replace

from matgptq_vllm.kernels.config import MAX_SPLIT_ROWS, MIN_BLOCK_M, Config
from matgptq_vllm.kernels.tuning import OVERLAP_CAPABILITY, Hardware, Problem, default, fitted, shared_bytes

SPLITS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32)
BLOCKS_N = (64, 128)
MAX_BLOCK_M = 128

FEWEST_PROGRAMS, MOST_PROGRAMS = 0.45, 8.0
"""Per multiprocessor. With fewer, most of the GPU is idle; more only add sums to be put together."""

KEPT = 2
"""Of the first round, how many are varied in the second."""

REGISTERS = (None, 128, 168)


def first_round(problem: Problem, hardware: Hardware, known: Config) -> list[Config]:
    """``known`` first, then shapes of tiles with shares of K, all with the default pipeline or the longest that fits."""
    base = default(problem, hardware)
    found = [fitted(known, problem, hardware), base]
    for block_m in _blocks_m(problem.bucket):
        for block_n in BLOCKS_N:
            shape = replace(base, block_m=block_m, block_n=block_n, num_warps=8 if block_m * block_n > 4096 else 4)
            found += [fitted(replace(shape, split_k=split), problem, hardware) for split in _splits(shape, problem, hardware)]
    return _allowed(found, problem, hardware)


def second_round(problem: Problem, hardware: Hardware, fastest: Iterable[Config]) -> list[Config]:
    """Other pipelines for the tiles that the first round found best, one change at a time and steps with stages."""
    found = []
    for config in fastest:
        found += [replace(config, step=step, num_stages=stages) for step in (256, 512) for stages in (2, 3, 4, 5)]
        found += [replace(config, num_warps=warps) for warps in (4, 8)]
        found += [replace(config, max_registers=registers) for registers in REGISTERS]
        if hardware.capability >= OVERLAP_CAPABILITY:
            found.append(replace(config, pdl=not config.pdl))
    return _allowed(found, problem, hardware)


def _blocks_m(bucket: int) -> list[int]:
    """The tile that holds the whole range, if one does, and those of a half and a quarter of it."""
    largest = min(max(bucket, MIN_BLOCK_M), MAX_BLOCK_M)
    return [block for block in (largest, largest // 2, largest // 4) if block >= MIN_BLOCK_M]


def _splits(shape: Config, problem: Problem, hardware: Hardware) -> list[int]:
    tiles = problem.tiles(shape)
    most = 1 if problem.bucket > MAX_SPLIT_ROWS else problem.blocks
    sensible = [
        split for split in SPLITS if split <= most and FEWEST_PROGRAMS <= tiles * split / hardware.num_sms <= MOST_PROGRAMS
    ]
    # A layer may be too small to keep the GPU busy, or so large that K need not be split.
    return sensible or [most if tiles < hardware.num_sms else 1]


def _allowed(configs: Iterable[Config], problem: Problem, hardware: Hardware) -> list[Config]:
    """Those within the limits, each once, in order."""
    return [
        config
        for config in dict.fromkeys(configs)
        if fitted(config, problem, hardware) == config and shared_bytes(config, problem) <= hardware.shared_bytes
    ]
