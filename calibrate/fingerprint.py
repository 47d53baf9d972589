"""What a run depends on, each input by name, so that a changed one can be named."""

import hashlib
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
import transformers

from calibrate.export import is_companion
from calibrate.options import CalibrateOptions
from matgptq_vllm import __version__
from matgptq_vllm.core.manifest import CONFIG_FILE

NOT_INPUTS = ("model", "text", "out", "overwrite", "restart", "dry_run")
"""Options that do not decide the result, or whose files do."""

CHUNK_BYTES = 1 << 22


def fingerprint(options: CalibrateOptions, weight_files: Iterable[str], device: torch.device, num_ranks: int) -> dict[str, str]:
    """Name of each input -> its value, or the SHA-256 of the file that it is.

    Args:
        weight_files: names of the files in the model folder that hold weights.
        device: where the run computes.
        num_ranks: processes of the run; more of them sum in another order.
    """
    model = options.model
    names = {CONFIG_FILE, *weight_files, *(path.name for path in model.iterdir() if is_companion(path))}
    files = {f"model file {name}": model / name for name in sorted(names)}
    if options.text is not None:
        files["text"] = options.text
    with ThreadPoolExecutor(max_workers=4) as pool:
        digests = dict(zip(files, pool.map(_sha256, files.values()), strict=True))
    chosen = {
        f"option {spec.name}": str(getattr(options, spec.name)) for spec in fields(options) if spec.name not in NOT_INPUTS
    }
    return {
        **digests,
        **chosen,
        "option device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "number of processes": str(num_ranks),
        "version of matgptq": __version__,
        "version of torch": torch.__version__,
        "version of transformers": transformers.__version__,
    }


def differences(before: Mapping[str, Any], now: Mapping[str, str]) -> list[str]:
    """What changed between two fingerprints, in words."""
    changed = []
    for name in sorted({*before, *now}):
        old, new = before.get(name), now.get(name)
        if old != new:
            is_file = name == "text" or name.startswith("model file ")
            changed.append(name if is_file else f"{name} (was {old}, is {new})")
    return changed


def _sha256(path: Path) -> str:
    sha256 = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            sha256.update(chunk)
    return sha256.hexdigest()
