"""The options of ``matgptq tune``. Imports no torch: the command line is built from this file."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from matgptq_vllm.core.errors import InputError
from matgptq_vllm.core.parent import GROUP_SIZES
from matgptq_vllm.core.summary import ParentSummary
from matgptq_vllm.kernels.bench.shapes import MODELS
from matgptq_vllm.kernels.tables import WIDTHS_CLASSES, bucket

DEFAULT_MS = "8,16,32,64,128,256,512"
DEFAULT_SECONDS = 900.0
MAX_WORKERS = 64

FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""Layers of a block that vLLM runs as one product, with their outputs side by side."""

Value = TypeVar("Value")


@dataclass(frozen=True)
class TuneOptions:
    """What to measure."""

    shapes: tuple[tuple[int, int], ...]
    """(N, K) of every product."""
    group_size: int = 128
    widths: tuple[str, ...] = WIDTHS_CLASSES
    """Classes of widths (kernels.tables)."""
    ms: tuple[int, ...] = (8, 16, 32, 64, 128, 256, 512)
    """Ranges of M, each named by its largest."""
    seconds: float = DEFAULT_SECONDS
    """Time allowed for everything."""
    out: Path | None = None
    """The table to add to; None is the one of this GPU in the user's directory."""
    workers: int = 0
    """Processes that compile; 0 is one per processor."""

    def __post_init__(self) -> None:
        if not self.shapes:
            raise InputError("there is no shape to measure; name a parent by --model, or shapes by --shapes 4096x14336,...")
        _check(self.group_size in GROUP_SIZES, "--group-size", self.group_size, f"one of {', '.join(map(str, GROUP_SIZES))}")
        for name in self.widths:
            _check(name in WIDTHS_CLASSES, "--widths", name, f"some of {', '.join(WIDTHS_CLASSES)}")
        for m in self.ms:
            _check(m >= 1 and bucket(m) == m, "--m", m, "some of 8, 16, 32 and so on, doubling")
        _check(0 < self.seconds < float("inf"), "--seconds", self.seconds, "a positive number")
        _check(0 <= self.workers <= MAX_WORKERS, "--workers", self.workers, f"a whole number, 0 to {MAX_WORKERS}")


def parse_shapes(text: str) -> tuple[tuple[int, int], ...]:
    """``"4096x14336,qwen3-8b"`` -> (N, K) of every product named, each once; InputError names the item that is wrong."""
    shapes: list[tuple[int, int]] = []
    for item in (part.strip() for part in text.split(",")):
        if item in MODELS:
            shapes += [(shape.n, shape.k) for shape in MODELS[item]]
        elif found := re.fullmatch(r"([1-9]\d{0,6})x([1-9]\d{0,6})", item):
            shapes.append((int(found[1]), int(found[2])))
        else:
            raise InputError(
                f"--shapes {item!r} is neither OUTPUTSxINPUTS, as 4096x14336, nor a known model: {', '.join(MODELS)}"
            )
    return tuple(dict.fromkeys(shapes))


def parse_list(option: str, text: str, parse: Callable[[str], Value]) -> tuple[Value, ...]:
    """Values of a comma-separated option, each once."""
    try:
        return tuple(dict.fromkeys(parse(part.strip()) for part in text.split(",")))
    except ValueError:
        raise InputError(f"{option} {text!r} is not a list of numbers; write for example {DEFAULT_MS}") from None


def shapes_of(parent: ParentSummary) -> tuple[tuple[int, int], ...]:
    """(N, K) of every product that a replica of a parent computes, each once."""
    products: dict[str, list[tuple[int, int]]] = {}
    for name, shape in parent.layers.items():
        block, _, layer = name.rpartition(".")
        together = next((names for names in FUSED if layer in names), (layer,))
        products.setdefault(f"{block}.{together[0]}", []).append(shape)
    return tuple(dict.fromkeys((sum(n for n, _ in parts), parts[0][1]) for parts in products.values()))


def _check(holds: bool, option: str, value: object, allowed: str) -> None:
    if not holds:
        raise InputError(f"{option} {value!r} is not supported; use {allowed}")
