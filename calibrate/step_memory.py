"""Steps of many experts, cut so that the statistics of one fit in memory."""

from collections.abc import Sequence

from calibrate.input_groups import Group
from calibrate.model import Block

STATISTICS_BYTES = 24 << 30
"""Most bytes of statistics at once, on the device: 128 experts of 2,048 inputs take 15 GB with three streams and their cross
products. More experts mean more forward passes of the block, not more memory."""

FLOAT32_BYTES = 4


def steps_in_memory(
    block: Block, steps: Sequence[list[Group]], num_matrices: int, limit: int = STATISTICS_BYTES
) -> list[list[Group]]:
    """``steps`` in order, those whose statistics take more than ``limit`` bytes in several parts of whole groups.

    Args:
        num_matrices: [K, K] matrices per group.
    """
    parts: list[list[Group]] = []
    for step in steps:
        used = limit
        for group in step:
            size = num_matrices * FLOAT32_BYTES * block.linears[group[0]].in_features ** 2
            if group is step[0] or used + size > limit:
                parts.append([])
                used = 0
            parts[-1].append(group)
            used += size
    return parts
