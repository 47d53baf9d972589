"""Which configurations are worth measuring for a product: two rounds, so that not every combination has to be compiled."""

from collections.abc import Iterable
from dataclasses import replace
from itertools import product

from matgptq_vllm.kernels.config import MAX_BLOCK_M, Config
from matgptq_vllm.kernels.tuning import OVERLAP_CAPABILITY, Hardware, Problem, default, fitted

BLOCKS_N = (16, 32)
WIDEST_BLOCK_N = 64
"""Pays only where a program has many rows: it needs the registers of as many sums."""

WARPS = (2, 4, 8)
MOST_WARPS = 16
"""In a program, for tiles of the fewest outputs."""

SPLITS = (1, 2, 4)

FEWEST_AT_ONCE, ENOUGH_AT_ONCE = 4, 16
"""Warps per multiprocessor. Fewer leave its memory pipes idle; with enough, K is shared by no more programs or warps."""

KEPT = 2
"""Of the first round, how many are varied in the second."""

DEPTHS = (1, 2, 3)
REGISTERS = (None, 96, 128, 168)


def first_round(problem: Problem, hardware: Hardware, known: Config) -> list[Config]:
    """``known`` first, then the default rule's choice, then shapes of tiles with ways to share K; at most some 25."""
    base = default(problem, hardware)
    narrow = [(block_n, warps) for block_n in BLOCKS_N for warps in WARPS] + [(BLOCKS_N[0], MOST_WARPS)]
    wide = [(WIDEST_BLOCK_N, warps) for warps in WARPS] if base.block_m == MAX_BLOCK_M else []
    # Deep and split is left to the second round.
    shares = [(1, 1), (1, 2), *((split, 1) for split in SPLITS[1:])]
    found = [
        replace(base, block_n=block_n, num_warps=warps, split_k=split, depth=depth)
        for (block_n, warps), (split, depth) in product(narrow + wide, shares)
    ]
    sensible = _sensible(_allowed(found, problem, hardware), problem, hardware)
    return _allowed([fitted(known, problem, hardware), base, *sensible], problem, hardware)


def second_round(problem: Problem, hardware: Hardware, fastest: Iterable[Config]) -> list[Config]:
    """Variations of those that the first round found best, one change at a time."""
    found = []
    for config in fastest:
        found += [replace(config, depth=depth) for depth in DEPTHS]
        found += [replace(config, max_registers=registers) for registers in REGISTERS]
        if hardware.capability >= OVERLAP_CAPABILITY:
            found.append(replace(config, pdl=not config.pdl))
    return _allowed(found, problem, hardware)


def _sensible(configs: list[Config], problem: Problem, hardware: Hardware) -> list[Config]:
    """Those that give the GPU enough warps, or of a small layer near the most that any does, and do not share K for nothing."""
    at_once = {config: problem.tiles(config) * config.split_k * config.num_warps / hardware.num_sms for config in configs}
    fewest = min(FEWEST_AT_ONCE, max(at_once.values()) / 4)
    return [
        config
        for config, warps in at_once.items()
        if warps >= fewest and (warps <= ENOUGH_AT_ONCE or (config.split_k == 1 and config.num_warps < MOST_WARPS))
    ]


def _allowed(configs: Iterable[Config], problem: Problem, hardware: Hardware) -> list[Config]:
    """Those within the limits, each once, in order."""
    return [config for config in dict.fromkeys(configs) if fitted(config, problem, hardware) == config]
