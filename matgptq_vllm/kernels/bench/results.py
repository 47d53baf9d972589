"""What a run of the benchmark found: records, sums over a model's layers, and the same as JSON."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass

DATASHEET_BYTES_PER_S = {
    "NVIDIA A100-SXM4-80GB": 2.039e12,
    "NVIDIA H100 80GB HBM3": 3.35e12,
    "NVIDIA H200": 4.8e12,
    "NVIDIA B200": 8.0e12,
}
"""Memory bandwidth that the maker states, by the name that the driver reports."""


@dataclass(frozen=True)
class Cell:
    """Time of one competitor on one matrix product."""

    model: str
    layer: str
    n: int
    k: int
    competitor: str
    """Key."""
    m: int
    us: float
    """Median over the rounds."""
    low_us: float
    high_us: float
    rounds: int
    bytes_read: int
    """Weight bytes, scales included, that it has to read."""
    error: float
    """||y - reference|| / ||reference|| of its output."""


@dataclass(frozen=True)
class Failure:
    """What could not be measured, and why."""

    model: str
    layer: str
    competitor: str
    m: int | None
    """None: at no M."""
    reason: str


@dataclass(frozen=True)
class Device:
    """What it was measured on."""

    name: str
    copy_bytes_per_s: float
    """Bytes read plus bytes written by a large device-to-device copy, per second."""
    versions: dict[str, str]
    """Of torch, triton and vLLM, where they are there."""

    @property
    def datasheet_bytes_per_s(self) -> float | None:
        return DATASHEET_BYTES_PER_S.get(self.name)


@dataclass(frozen=True)
class Results:
    """One run."""

    device: Device
    group_size: int
    rule: str
    competitors: Sequence[str]
    """Keys, in the order of the tables."""
    ms: Sequence[int]
    cells: Sequence[Cell]
    failures: Sequence[Failure]

    @property
    def models(self) -> list[str]:
        """Names, in the order measured."""
        return list(dict.fromkeys([cell.model for cell in self.cells] + [failure.model for failure in self.failures]))


Sums = dict[tuple[str, int], float]
"""(competitor, M): microseconds, or bytes, of all layers of a model."""


def layer_sums(results: Results, model: str, layers: Sequence[str]) -> tuple[Sums, Sums]:
    """Sums over ``layers`` of microseconds and of weight bytes read; without what any layer lacks."""
    found: dict[tuple[str, int], dict[str, Cell]] = {}
    for cell in results.cells:
        if cell.model == model:
            found.setdefault((cell.competitor, cell.m), {})[cell.layer] = cell
    whole = {key: [cells[layer] for layer in layers] for key, cells in found.items() if set(layers) <= set(cells)}
    times = {key: sum(cell.us for cell in cells) for key, cells in whole.items()}
    read = {key: float(sum(cell.bytes_read for cell in cells)) for key, cells in whole.items()}
    return times, read


def as_json(results: Results) -> str:
    """The run as a JSON object with the fields of ``Results``."""
    return json.dumps(asdict(results), indent=1)
