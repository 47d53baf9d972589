"""Write a parent so that a folder of that name is always whole: into a temporary folder beside it, renamed at the end."""

import json
import os
import shutil
import stat
import tempfile
from pathlib import Path
from types import TracebackType

import safetensors.torch
import torch

from matgptq_vllm.core.checkpoint import MODEL_SET, SCALES, plane_name, plane_set
from matgptq_vllm.core.digest import digest
from matgptq_vllm.core.errors import InputError
from matgptq_vllm.core.folder_swap import partial_directory, put_in_place, restore_interrupted, sync
from matgptq_vllm.core.manifest import INDEX_FILE, MANIFEST_FILE, PLANES_FOLDER, Manifest, read_manifest
from matgptq_vllm.core.parent import ParentSpec
from matgptq_vllm.core.planes import PlaneLayout
from matgptq_vllm.core.profile import PROFILES_FILE, Profile, profiles_to_json
from matgptq_vllm.core.slicing import num_groups

SHARD_BYTES = 4 << 30
"""A shard is closed when it holds this much."""


class ParentWriter:
    """Context manager that writes one parent; leaving it by an error removes everything written.

    Args:
        directory: the parent to create. Must not exist, unless ``overwrite``; an old parent is replaced only at the
            end, by the whole new one.
        spec: constants of the parent.

    Raises:
        InputError: ``directory`` exists and ``overwrite`` is not set.
        OSError: the disk is full, or the folder cannot be written.
    """

    def __init__(self, directory: str | Path, spec: ParentSpec, overwrite: bool = False, shard_bytes: int = SHARD_BYTES):
        self._target = Path(directory).absolute()
        restore_interrupted(self._target)
        if self._target.exists() and not overwrite:
            raise InputError(
                f"{directory} exists; choose another --out, or pass --overwrite to replace it when the new parent is whole"
            )
        self.directory = partial_directory(self._target)
        """Folder to put config.json, tokenizer and model card into, before ``finish``."""
        self._spec = spec
        self._layout = PlaneLayout(spec.plane_widths)
        self._shard_bytes = shard_bytes
        self._pending: dict[str, dict[str, torch.Tensor]] = {}
        self._num_shards: dict[str, int] = {}
        self._shard_of: dict[str, tuple[str, int]] = {}
        self._sha256: dict[str, str] = {}
        self._layers: dict[str, tuple[int, int]] = {}
        self._total_bytes = 0

    def __enter__(self) -> "ParentWriter":
        shutil.rmtree(self.directory, ignore_errors=True)
        (self.directory / PLANES_FOLDER).mkdir(parents=True)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        # After finish() the folder has been renamed and there is nothing left to remove.
        shutil.rmtree(self.directory, ignore_errors=True)

    def add_layer(self, name: str, codes: torch.Tensor, scales: torch.Tensor) -> None:
        """Add a quantized layer: codes uint8 [N, K], scales [N, num_groups(K, group_size)]."""
        n, k = codes.shape
        expected = (n, num_groups(k, self._spec.group_size))
        if codes.dtype != torch.uint8 or scales.shape != expected:
            raise ValueError(
                f"{name}: codes {codes.dtype}{list(codes.shape)} need scales {list(expected)}, got {list(scales.shape)}"
            )
        self._layers[name] = (n, k)
        self._add(MODEL_SET, f"{name}.{SCALES}", scales.to(getattr(torch, self._spec.scale_dtype)))
        for plane, packed in enumerate(self._layout.split(codes)):
            self._add(plane_set(plane), f"{name}.{plane_name(plane)}", packed)

    def add_tensor(self, name: str, tensor: torch.Tensor) -> None:
        """Add a weight that is not quantized."""
        self._add(MODEL_SET, name, tensor)

    def finish(self, profiles: list[Profile] | None = None) -> None:
        """Write what is pending, the index, the profile table and last the manifest; then give the folder its name.

        Raises:
            FormatError: the config.json that the caller put there is missing or describes another parent.
        """
        for file_set in list(self._pending):
            self._flush(file_set)
        index = {name: self._rename(file_set, shard) for name, (file_set, shard) in self._shard_of.items()}
        _write_text(
            self.directory / INDEX_FILE,
            json.dumps({"metadata": {"total_size": self._total_bytes}, "weight_map": index}, indent=1) + "\n",
        )
        _write_text(self.directory / PROFILES_FILE, profiles_to_json(profiles or []))
        _write_text(self.directory / MANIFEST_FILE, Manifest(self._spec, self._layers, self._sha256).to_json())
        read_manifest(self.directory)
        sync(self.directory / PLANES_FOLDER)
        put_in_place(self._target)

    def _add(self, file_set: str, name: str, tensor: torch.Tensor) -> None:
        if name in self._sha256:
            raise ValueError(f"tensor {name!r} was already added to the parent")
        # A copy: the caller may reuse its buffer before the shard is written, and safetensors refuses tied tensors.
        tensor = tensor.detach().to("cpu", copy=True).contiguous()
        pending = self._pending.setdefault(file_set, {})
        size = tensor.nbytes
        if pending and sum(held.nbytes for held in pending.values()) + size > self._shard_bytes:
            self._flush(file_set)
            pending = self._pending.setdefault(file_set, {})
        pending[name] = tensor
        self._sha256[name] = digest(tensor)
        self._shard_of[name] = (file_set, self._num_shards.get(file_set, 0))
        self._total_bytes += size

    def _flush(self, file_set: str) -> None:
        tensors = self._pending.pop(file_set)
        shard = self._num_shards.get(file_set, 0)
        self._num_shards[file_set] = shard + 1
        path = self.directory / _pending_file(file_set, shard)
        try:
            safetensors.torch.save_file(tensors, str(path), metadata={"format": "pt"})
        except safetensors.SafetensorError as error:
            raise OSError(f"{path}: cannot be written ({error})") from error
        # safetensors makes files that only their owner may read; a parent is served by other users as well.
        path.chmod(_mode_of_new_files(self.directory))
        with path.open("rb") as file:
            os.fsync(file.fileno())

    def _rename(self, file_set: str, shard: int) -> str:
        name = f"{file_set}-{shard + 1:05}-of-{self._num_shards[file_set]:05}.safetensors"
        pending = self.directory / _pending_file(file_set, shard)
        if pending.exists():
            pending.rename(self.directory / name)
        return name


def write_profiles(directory: Path, profiles: list[Profile]) -> None:
    """Replace the profile table of the parent in ``directory`` in one step."""
    path = directory / PROFILES_FILE
    temporary = path.with_name(f".{PROFILES_FILE}.partial")
    _write_text(temporary, profiles_to_json(profiles))
    temporary.replace(path)


def _pending_file(file_set: str, shard: int) -> str:
    # The number of shards is known only at the end; until then a file has a name that no reader looks for.
    return f"{file_set}-{shard + 1:05}.pending"


def _mode_of_new_files(directory: Path) -> int:
    """Permissions that the process gives to the files it makes; asking the umask itself would change it for a moment."""
    with tempfile.TemporaryDirectory(dir=directory) as folder:
        probe = Path(folder) / "probe"
        probe.touch()
        return stat.S_IMODE(probe.stat().st_mode)


def _write_text(path: Path, text: str) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
