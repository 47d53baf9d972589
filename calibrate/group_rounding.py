"""Round the layers of a group as one, rows split over the processes of the run, and measure what it cost each layer."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from calibrate.ranks import Ranks
from calibrate.resident_block import Stream
from calibrate.rounding import RoundingSettings, round_layers
from calibrate.statistics import InputStatistics
from matgptq_vllm.core.precision import WIDTHS
from matgptq_vllm.core.slicing import check_rule, dequantize


@dataclass(frozen=True)
class RoundedLayer:
    """One linear layer, calibrated."""

    name: str
    codes: torch.Tensor
    """uint8 [N, K]."""
    scales: torch.Tensor
    """The stored scale type, [N, num_groups]."""
    errors: Mapping[int, float]
    """Width -> squared error of the layer's outputs, relative to its squared outputs, both for the inputs of the width's
    stream; empty without calibration text."""
    num_tokens: int
    """Calibration tokens that reached the layer."""

    def values(self, width: int, settings: RoundingSettings) -> torch.Tensor:
        """Weights of the layer read at ``width``, float32 [N, K]."""
        return dequantize(self.codes, self.scales, width, check_rule(settings.slice_rule), settings.group_size)

    def to(self, device: torch.device) -> "RoundedLayer":
        """The same on another device."""
        return RoundedLayer(self.name, self.codes.to(device), self.scales.to(device), self.errors, self.num_tokens)


def round_group(
    weights: Mapping[str, torch.Tensor],
    statistics: Mapping[Stream, InputStatistics],
    settings: RoundingSettings,
    ranks: Ranks,
) -> list[RoundedLayer]:
    """Layers that share their inputs, in the order of ``weights``.

    Args:
        weights: layer -> floating [N, K].
        statistics: of their inputs; that of None, the original stream, is always there.
    """
    name, num_tokens = next(iter(weights)), statistics[None].num_tokens
    stacked = torch.cat(list(weights.values()))
    part = ranks.part_of(stacked)
    with ranks.together():
        rounded = round_layers(part, statistics, settings, name)
    codes = ranks.gather_rows(rounded.codes, len(stacked))
    scales = ranks.gather_rows(rounded.scales, len(stacked))
    squares = torch.stack([rounded.squared_errors, rounded.squared_outputs], dim=2).transpose(0, 1)  # [N, 5, 2]
    squares = ranks.gather_rows(squares, len(stacked))
    rows = [len(weight) for weight in weights.values()]
    parts = zip(weights, codes.split(rows), scales.split(rows), squares.split(rows), strict=True)
    return [
        RoundedLayer(layer, of_codes, of_scales, _errors(of_squares), num_tokens)
        for layer, of_codes, of_scales, of_squares in parts
    ]


def in_order(layers: Sequence[RoundedLayer], names: Sequence[str]) -> list[RoundedLayer]:
    """``layers`` in the order of ``names``."""
    by_name = {layer.name: layer for layer in layers}
    return [by_name[name] for name in names]


def _errors(squares: torch.Tensor) -> dict[int, float]:
    """Width -> relative error of a layer with these squared errors and squared outputs, float32 [N, 5, 2]."""
    ratios = []
    for errors, outputs in squares.double().sum(0).tolist():
        ratios.append(errors / max(outputs, torch.finfo(torch.float32).tiny))
    return dict(zip(WIDTHS, ratios, strict=True))
