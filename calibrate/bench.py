"""Time calibration on blocks of the shape of a large model, with random weights: python -m calibrate.bench --shape 8b

The functions are those of a real run. One more block than is timed belongs to the model, so that the last one timed
computes the inputs of another, as all but one do.
"""

import argparse
import json
import time
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import LlamaConfig

from calibrate.clock import PhaseClock, peak_device_bytes, peak_host_bytes
from calibrate.device import resolve_device, resolve_dtype
from calibrate.model import find_blocks, skeleton
from calibrate.option_fields import DEVICES
from calibrate.options import COMPUTE_DTYPES, CalibrateOptions, parse_streams
from calibrate.pipeline import Calibration, round_blocks
from calibrate.ranks import Ranks
from calibrate.run import rounding_settings

SHAPES = {
    # hidden size, intermediate size, attention heads, key-value heads
    "tiny": (64, 192, 4, 2),
    "8b": (4096, 14336, 32, 8),
    "70b": (8192, 28672, 64, 8),
}
"""Shapes of Llama models; 8b and 70b are those of Llama 3.1."""

VOCAB_SIZE = 1024
"""Small: the embeddings are not what is timed."""


@dataclass(frozen=True)
class RandomWeights:
    """Weights that no disk holds, the same for the same name.

    Args:
        model: a skeleton, for their shapes.
        device: where to make them.
    """

    model: nn.Module
    device: torch.device

    def read(self, name: str) -> torch.Tensor:
        """bfloat16: of a matrix normal, scaled to keep the size of activations; of a norm ones."""
        shape = self.model.get_parameter(name).shape
        if len(shape) == 1:
            return torch.ones(shape, dtype=torch.bfloat16, device=self.device)
        generator = torch.Generator(self.device).manual_seed(zlib.crc32(name.encode()))
        weight = torch.randn(shape, generator=generator, device=self.device, dtype=torch.float32)
        return weight.mul_(shape[1] ** -0.5).to(torch.bfloat16)


def measure(shape: str, blocks: int, num_samples: int, seq_len: int, options: CalibrateOptions) -> dict[str, Any]:
    """Seconds per phase and block, and peak memory, as JSON values.

    Args:
        shape: a name in ``SHAPES``.
        blocks: how many blocks to calibrate.
        options: how; their model, text and out are not used.
    """
    device = resolve_device(options.device)
    hidden_size, intermediate_size, num_heads, num_kv_heads = SHAPES[shape]
    config = LlamaConfig(
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        num_attention_heads=num_heads,
        num_key_value_heads=num_kv_heads,
        num_hidden_layers=blocks + 1,
        vocab_size=VOCAB_SIZE,
        max_position_embeddings=seq_len,
        dtype="bfloat16",
    )
    model = skeleton(config)
    windows = torch.randint(VOCAB_SIZE, (num_samples, seq_len), generator=torch.Generator().manual_seed(0))
    dtype = resolve_dtype(options.compute_dtype, device, hidden_size)
    clock = PhaseClock(device)
    calibration = Calibration(rounding_settings(options), options.streams, dtype, Ranks(0, 1, device), clock)
    started = time.monotonic()
    source = RandomWeights(model, device)
    rounding = round_blocks(model, find_blocks(model), source, windows, calibration, lambda _: None)
    results = []
    before: dict[str, float] = {}
    for block in islice(rounding, blocks):
        total = clock.seconds()
        results.append(
            {
                "seconds": block.seconds,
                "phases": {name: seconds - before.get(name, 0.0) for name, seconds in total.items()},
                "errors": {layer.name.removeprefix(f"{block.name}."): dict(layer.errors) for layer in block.layers},
            }
        )
        before = total
    return {
        "shape": shape,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "tokens": windows.numel(),
        "streams": list(options.streams),
        "asymmetry": options.asymmetry,
        "sweeps": options.sweeps,
        "compute_dtype": str(dtype).removeprefix("torch."),
        "blocks": results,
        "seconds": time.monotonic() - started,
        "peak_device_bytes": peak_device_bytes(device),
        "peak_host_bytes": peak_host_bytes(),
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print the result and, with ``--out``, write it as JSON."""
    defaults = CalibrateOptions(Path(), Path(), Path())
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", choices=SHAPES, default="8b")
    parser.add_argument("--blocks", type=int, default=1, help="blocks to calibrate")
    parser.add_argument("--num-samples", type=int, default=128, help="windows")
    parser.add_argument("--seq-len", type=int, default=2048, help="tokens per window")
    parser.add_argument("--streams", type=parse_streams, default=defaults.streams)
    parser.add_argument("--asymmetry", type=float, default=defaults.asymmetry)
    parser.add_argument("--sweeps", type=int, default=defaults.sweeps)
    parser.add_argument("--compute-dtype", choices=COMPUTE_DTYPES, default="auto")
    parser.add_argument("--device", choices=DEVICES, default="auto")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    chosen = parser.parse_args(arguments)
    options = CalibrateOptions(
        Path(),
        Path(),
        Path(),
        streams=chosen.streams,
        asymmetry=chosen.asymmetry,
        sweeps=chosen.sweeps,
        compute_dtype=chosen.compute_dtype,
        device=chosen.device,
    )
    report = json.dumps(measure(chosen.shape, chosen.blocks, chosen.num_samples, chosen.seq_len, options), indent=1)
    print(report)
    if chosen.out is not None:
        chosen.out.write_text(report + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
