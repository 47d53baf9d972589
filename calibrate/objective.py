"""The joint objective of all widths: which code of a weight serves every width best.

Every width r has its own target t_r for a weight (its weight, and what the errors of other columns at that width ask of it)
and its own importance w_r. The objective of code q, with levels L_r(q), is

    sum over r of w_r * (t_r - L_r(q))^2

MatGPTQ (arXiv 2602.03537, section 3) has one target for all widths and searches all 256 codes. With a target per width,
the top bits decide the narrow widths (2, 3, 4) alone. So the candidates are, for each prefix of them, the code nearest to
the target of 8 bits; and, whatever their prefix, the codes nearest to it within two bins of 6 bits: that of the target of
6 bits, and that of the best compromise between both targets. (Without the latter the two widths of ``round`` drift apart:
what 6 bits ask for is then never a candidate, unless 8 bits give up altogether.)

    rule             prefixes    codes per prefix
    nested, curved   16          16
    round            32          8
"""

from dataclasses import dataclass

import torch

from matgptq_vllm.core.precision import PARENT_WIDTH, WIDTHS
from matgptq_vllm.core.slicing import SliceRule, bits_read, levels, nearest_codes

NARROW = tuple(width for width in WIDTHS if width <= 4)
"""Widths that the prefix of a code decides."""

WIDE = tuple(width for width in WIDTHS if width > 4)
"""6 and 8 bits."""

BIN_BITS = PARENT_WIDTH - WIDE[0]
"""Codes of one level at 6 bits: 2^BIN_BITS."""


@dataclass(frozen=True)
class LevelTables:
    """Levels of all codes at all widths."""

    rule: SliceRule
    levels: torch.Tensor
    """float32 [5, 256], a row per width of ``WIDTHS``."""
    narrow: torch.Tensor
    """Level of every prefix at the narrow widths, float32 [3, prefixes, 1]."""
    lowest: torch.Tensor
    """Least level of a code of each prefix at the wide widths, float32 [2, prefixes, 1]."""
    highest: torch.Tensor
    """Greatest level, likewise."""

    @classmethod
    def of(cls, rule: SliceRule, device: torch.device) -> "LevelTables":
        """The tables of ``rule`` on ``device``."""
        codes = torch.arange(1 << PARENT_WIDTH, device=device).to(torch.uint8)
        table = torch.stack([levels(codes, width, rule) for width in WIDTHS])
        span = codes_per_prefix(rule)
        narrow, wide = table[: len(NARROW), :, None], table[len(NARROW) :, :, None]
        return cls(
            rule, table, narrow[:, ::span].contiguous(), wide[:, ::span].contiguous(), wide[:, span - 1 :: span].contiguous()
        )


def codes_per_prefix(rule: SliceRule) -> int:
    """How many codes share the bits that decide the narrow widths."""
    return 1 << (PARENT_WIDTH - bits_read(NARROW[-1], rule))


def bin_shift(rule: SliceRule) -> int:
    """Code ``bin * 2^BIN_BITS - bin_shift`` is the first of a bin of 6 bits: ``round`` centers its bins on their levels."""
    return (1 << BIN_BITS) // 2 if rule == "round" else 0


def choose(targets: torch.Tensor, importance: torch.Tensor, tables: LevelTables) -> torch.Tensor:
    """Best code of each weight.

    Args:
        targets: float32 [5, n] in units of the scale, one row per width of ``WIDTHS``.
        importance: float32 [5, n], not negative.

    Returns:
        uint8 [n]; of equally good candidates the first.
    """
    nearest = nearest_codes(targets[-1], tables.rule).int()  # [n]
    six, eight = importance[-2], importance[-1]
    compromise = (six * targets[-2] + eight * targets[-1]) / (six + eight).clamp_min(torch.finfo(torch.float32).tiny)

    loss = importance[0] * (targets[0] - tables.narrow[0]).square_()  # [prefixes, n]
    for row in range(1, len(NARROW)):
        loss += (targets[row] - tables.narrow[row]).square_().mul_(importance[row])
    at_nearest = tables.levels[len(NARROW) :, nearest]  # [2, n]
    for row in range(len(WIDE)):
        # Levels never fall as codes rise: clamping the level is clamping the code to the prefix.
        level = at_nearest[row].clamp(tables.lowest[row], tables.highest[row])
        loss += (targets[len(NARROW) + row] - level).square_().mul_(importance[len(NARROW) + row])
    least, prefix = loss.min(0)

    span = codes_per_prefix(tables.rule)
    low = prefix.int().mul_(span)
    best = nearest.clamp(low, low + (span - 1))
    for target in (targets[-2], compromise):
        code = _within_bin(nearest, target, tables.rule)
        loss = _loss(code, targets, importance, tables)
        best = torch.where(loss < least, code, best)
        least = torch.minimum(loss, least)
    return best.to(torch.uint8)


def _within_bin(codes: torch.Tensor, target: torch.Tensor, rule: SliceRule) -> torch.Tensor:
    """The nearest of ``codes``, int32 [n], that are in the bin of 6 bits of each target [n]."""
    shift = bin_shift(rule)
    # Down, not to the nearest code: ``round`` would round a target twice on its way to a bin.
    below = nearest_codes(target, "nested" if rule == "round" else rule).int().clamp_(max=(1 << PARENT_WIDTH) - 1 - shift)
    first = ((below + shift) >> BIN_BITS << BIN_BITS) - shift
    return codes.clamp(first, first + ((1 << BIN_BITS) - 1)).clamp_(0, (1 << PARENT_WIDTH) - 1)


def _loss(codes: torch.Tensor, targets: torch.Tensor, importance: torch.Tensor, tables: LevelTables) -> torch.Tensor:
    """The joint objective of each code, int32 [n] -> [n]."""
    of_widths = importance * (targets - tables.levels[:, codes]).square_()  # [5, n]
    loss = of_widths[0]
    for row in range(1, len(WIDTHS)):
        loss = loss + of_widths[row]
    return loss
