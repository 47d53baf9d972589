"""Experts that routing gave too few tokens: what they are rounded by, and the report of it.

A Hessian of n tokens knows nothing of all but n directions of K inputs, and codes fitted to it are wrong for the tokens to
come. So the statistics of an expert that saw n < m tokens, m = ``TOKENS_PER_INPUT`` K, are topped up to m tokens by those of
the average token of all experts:

    H' = (n H + (m - n) H_all) / m        H_all = sum of n_e H_e / sum of n_e

Every token goes to equally many experts, so for gate and up projections H_all is the Hessian of all tokens at the mixture's
input. An expert without a token is rounded by H_all alone.
"""

import warnings
from collections.abc import Mapping, Sequence

import torch

from calibrate.group_rounding import RoundedLayer
from calibrate.input_groups import Group
from calibrate.model import Block
from calibrate.resident_block import Stream
from calibrate.statistics import InputStatistics

TOKENS_PER_INPUT = 2
"""Tokens per input of a layer from which on an expert's own statistics are used alone."""


def tokens_wanted(k: int) -> int:
    """Tokens that an expert's layer of ``k`` inputs should see at least."""
    return TOKENS_PER_INPUT * k


def top_up(block: Block, found: Mapping[Group, Mapping[Stream, InputStatistics]]) -> None:
    """Top up the statistics of experts with few tokens, in place; those of other layers stay as they are.

    Args:
        found: statistics of groups of one step. H_all is over those of them that are experts'.
    """
    of_experts = [found[group] for group in found if group[0] in block.experts]
    for stream in of_experts[0] if of_experts else ():
        _top_up([statistics[stream] for statistics in of_experts])


def few_token_layers(block: Block, layers: Sequence[RoundedLayer]) -> dict[str, int]:
    """Tokens of every expert's layer that saw fewer than it should, in the original's stream."""
    return {
        layer.name: layer.num_tokens
        for layer in layers
        if layer.name in block.experts and layer.num_tokens < tokens_wanted(layer.codes.shape[1])
    }


def warn_of_few_tokens(block: Block, layers: Sequence[RoundedLayer]) -> None:
    """Warn of the experts of a calibrated block that saw too few tokens, all in one line."""
    few = few_token_layers(block, layers)
    if not few:
        return
    scarce = {block.experts[name]: tokens for name, tokens in few.items()}
    warnings.warn(
        f"{block.name}: {len(scarce)} of {len(set(block.experts.values()))} experts saw fewer than {TOKENS_PER_INPUT} "
        f"calibration tokens per input ({list(scarce.values()).count(0)} saw none); they are rounded by the average over all "
        "experts too. More calibration text avoids this",
        stacklevel=2,
    )


def _top_up(experts: Sequence[InputStatistics]) -> None:
    """For the experts of one stream; all have K inputs."""
    wanted = tokens_wanted(len(experts[0].hessian))
    scarce = [statistics for statistics in experts if statistics.num_tokens < wanted]
    if not scarce:
        return
    hessian = _mean([(statistics.hessian, statistics.num_tokens) for statistics in experts])
    crosses = [(statistics.cross, statistics.num_tokens) for statistics in experts if statistics.cross is not None]
    cross = _mean(crosses) if crosses else None
    for statistics in scarce:
        share = 1 - statistics.num_tokens / wanted
        statistics.hessian.lerp_(hessian, share)
        if statistics.cross is not None and cross is not None:
            statistics.cross.lerp_(cross, share)


def _mean(items: Sequence[tuple[torch.Tensor, int]]) -> torch.Tensor:
    """Mean over tokens of matrices [K, K] that are means over so many tokens each; 0 without tokens."""
    total = torch.zeros_like(items[0][0])
    num_tokens = max(sum(count for _, count in items), 1)
    for matrix, count in items:
        total.add_(matrix, alpha=count / num_tokens)
    return total
