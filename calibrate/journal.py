"""The folder of an unfinished run: what it depends on, and every finished block.

    .NAME.run/
        lock                      held by the process that runs
        journal.json              the fingerprint of the run's inputs
        block-00000.safetensors   codes and scales of the block's layers; the rest as JSON in the metadata

Files appear whole, or not at all, so a run that is killed at any moment can be taken up where it was.
"""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType

import safetensors
import safetensors.torch
import torch

from calibrate.fingerprint import differences
from calibrate.group_rounding import RoundedLayer
from calibrate.pipeline import RoundedBlock
from calibrate.run_lock import RunLock
from matgptq_vllm.core.errors import FormatError, InputError
from matgptq_vllm.core.folder_swap import sync

JOURNAL_FILE = "journal.json"
CODES, SCALES = "codes", "scales"


def run_directory(out: Path) -> Path:
    """Folder of the unfinished run whose parent will be ``out``."""
    out = out.absolute()
    return out.with_name(f".{out.name}.run")


class Journal:
    """Context manager that holds the lock of a run. An unfinished run with the same inputs is taken up.

    Leaving it keeps the folder, for the next run, unless ``discard`` was called.

    Args:
        out: the parent that the run will write.
        fingerprint: name of each input of the run -> its value or digest.
        restart: discard an unfinished run.

    Raises:
        InputError: another process holds the lock, or the unfinished run had other inputs.
    """

    def __init__(self, out: Path, fingerprint: Mapping[str, str], restart: bool = False):
        self._directory = run_directory(out)
        self._lock = RunLock(self._directory, out)
        try:
            if restart:
                self._remove_blocks()
            self._begin(out, fingerprint)
        except BaseException:
            self._lock.release()
            raise
        self._discarded = False

    def __enter__(self) -> "Journal":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._discarded:
            shutil.rmtree(self._directory, ignore_errors=True)
        self._lock.release()

    def discard(self) -> None:
        """Remove the folder on leaving: the run is finished, or never can be."""
        self._discarded = True

    def write(self, index: int, block: RoundedBlock) -> None:
        """Keep the block with number ``index``."""
        tensors: dict[str, torch.Tensor] = {}
        about = {}
        for layer in block.layers:
            tensors[f"{layer.name}.{CODES}"] = layer.codes.contiguous()
            tensors[f"{layer.name}.{SCALES}"] = layer.scales.contiguous()
            about[layer.name] = {
                "errors": {str(width): error for width, error in layer.errors.items()},
                "tokens": layer.num_tokens,
            }
        metadata = {"name": block.name, "layers": about, "seconds": block.seconds, "peak_bytes": block.peak_bytes}
        path = self._block_file(index)
        temporary = path.with_name(f".{path.name}")
        try:
            safetensors.torch.save_file(tensors, str(temporary), metadata={"block": json.dumps(metadata)})
        except safetensors.SafetensorError as error:
            temporary.unlink(missing_ok=True)
            raise OSError(f"{temporary}: cannot be written ({error}); the finished blocks are kept for the next run") from error
        _replace(temporary, path)

    def read(self, index: int) -> RoundedBlock | None:
        """The block with number ``index``, or None if no run finished it.

        Raises:
            FormatError: its file is damaged.
        """
        path = self._block_file(index)
        if not path.exists():
            return None
        try:
            with safetensors.safe_open(path, framework="pt") as file:
                about = json.loads(file.metadata()["block"])
                layers = [
                    RoundedLayer(
                        name,
                        file.get_tensor(f"{name}.{CODES}"),
                        file.get_tensor(f"{name}.{SCALES}"),
                        {int(width): error for width, error in layer["errors"].items()},
                        layer["tokens"],
                    )
                    for name, layer in about["layers"].items()
                ]
        except (safetensors.SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
            raise FormatError(f"{path}: damaged ({error}); --restart discards the unfinished run") from error
        return RoundedBlock(about["name"], layers, about["seconds"], about["peak_bytes"])

    def _begin(self, out: Path, fingerprint: Mapping[str, str]) -> None:
        path = self._directory / JOURNAL_FILE
        if not path.exists():
            self._remove_blocks()
            temporary = path.with_name(f".{path.name}")
            temporary.write_text(json.dumps(dict(fingerprint), indent=1) + "\n", encoding="utf-8")
            _replace(temporary, path)
            return
        try:
            before = dict(json.loads(path.read_text(encoding="utf-8")))
        except (ValueError, TypeError) as error:
            raise FormatError(f"{path}: no journal of a run; --restart discards the unfinished run") from error
        changed = differences(before, fingerprint)
        if changed:
            raise InputError(
                f"an unfinished run to {out} had other inputs: {'; '.join(changed)}. Give it the same inputs to take it up, "
                "or discard it with --restart"
            )

    def _remove_blocks(self) -> None:
        # The lock stays; the journal goes first, so that blocks are never left without the inputs that they belong to.
        (self._directory / JOURNAL_FILE).unlink(missing_ok=True)
        for path in self._directory.glob("*block-*.safetensors"):
            path.unlink()

    def _block_file(self, index: int) -> Path:
        return self._directory / f"block-{index:05}.safetensors"


def _replace(temporary: Path, path: Path) -> None:
    """Give ``temporary`` the name ``path``, so that after a crash the file is either whole or not there."""
    sync(temporary)
    temporary.replace(path)
    sync(path.parent)
