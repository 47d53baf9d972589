"""Units of the search: layers that get one width together, because engines run them as one matrix product."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from matgptq_vllm.core.profile import FUSED_LAYERS, Profile

Genome = tuple[int, ...]
"""Width of every unit, in the order of the units."""


@dataclass(frozen=True)
class Unit:
    """One gene of a profile."""

    layers: tuple[str, ...]
    """Names as in the checkpoint; one, or the members of a fused layer."""

    shape: tuple[int, int]
    """(N, K) of the one matrix product: outputs of all layers together, and inputs."""


def find_units(layers: Mapping[str, tuple[int, int]]) -> list[Unit]:
    """The units of a parent.

    Args:
        layers: quantized layers in checkpoint order: name -> (N, K).
    """
    members: dict[str, list[str]] = {}
    for name in layers:
        members.setdefault(_fused_name(name), []).append(name)
    return [Unit(tuple(names), (sum(layers[name][0] for name in names), layers[names[0]][1])) for names in members.values()]


def genome_profile(name: str, units: Sequence[Unit], genome: Genome) -> Profile:
    """The profile called ``name`` that reads every unit at its width in ``genome``."""
    return Profile(name, dict(_layer_widths(units, genome)))


def _layer_widths(units: Sequence[Unit], genome: Genome) -> Iterable[tuple[str, int]]:
    for unit, width in zip(units, genome, strict=True):
        for layer in unit.layers:
            yield layer, width


def _fused_name(name: str) -> str:
    prefix, _, leaf = name.rpartition(".")
    for group in FUSED_LAYERS:
        if leaf in group:
            return f"{prefix}.{'+'.join(group)}"
    return name
