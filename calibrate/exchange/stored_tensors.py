"""The tensors of a Hugging Face folder by name: shapes without reading data, data one tensor at a time."""

import json
from pathlib import Path
from typing import Any

import safetensors
import torch

from matgptq_vllm.core.errors import FormatError, InputError
from matgptq_vllm.core.manifest import INDEX_FILE
from matgptq_vllm.core.safetensors_header import read_header

SINGLE_FILE = "model.safetensors"


class StoredTensors:
    """The weights in a folder of one safetensors file, or of shards with Hugging Face's index.

    Raises (from the constructor and every method):
        InputError: the folder has no safetensors weights.
        FormatError: the index or a file is damaged, or they disagree.
    """

    def __init__(self, directory: Path):
        self._directory = directory
        self._file_of = _files_by_tensor(directory)
        self._open_files: dict[str, Any] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        """Tensor name -> shape."""
        self.dtypes: dict[str, str] = {}
        """Tensor name -> type as safetensors calls it: U8, F16, BF16, F32."""
        for name, file in self._file_of.items():
            shard = self._open(file)
            try:
                view = shard.get_slice(name)
            except safetensors.SafetensorError as error:
                raise FormatError(f"{file}: has no tensor {name!r}, which {INDEX_FILE} promises; copy it again") from error
            self.shapes[name], self.dtypes[name] = tuple(view.get_shape()), view.get_dtype()

    def get(self, name: str) -> torch.Tensor:
        """The tensor ``name``, on the CPU."""
        return self._open(self._file_of[name]).get_tensor(name)

    def _open(self, file: str) -> Any:
        if file not in self._open_files:
            read_header(self._directory, file)
            try:
                self._open_files[file] = safetensors.safe_open(str(self._directory / file), framework="pt", device="cpu")
            except (safetensors.SafetensorError, OSError) as error:
                raise FormatError(f"{file}: cannot be read ({error}); copy it again") from error
        return self._open_files[file]


def _files_by_tensor(directory: Path) -> dict[str, str]:
    path = directory / INDEX_FILE
    if path.is_file():
        try:
            files = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise FormatError(f"{path}: not an index of weights ({type(error).__name__}: {error}); copy it again") from error
        if not isinstance(files, dict) or not all(isinstance(file, str) and Path(file).name == file for file in files.values()):
            raise FormatError(f"{path}: weight_map must map tensor names to files beside it; copy it again")
        return files
    if not (directory / SINGLE_FILE).is_file():
        raise InputError(f"{directory} has neither {INDEX_FILE} nor {SINGLE_FILE}; copy the weights there")
    read_header(directory, SINGLE_FILE)
    try:
        with safetensors.safe_open(str(directory / SINGLE_FILE), framework="pt", device="cpu") as single:
            return dict.fromkeys(single.keys(), SINGLE_FILE)
    except (safetensors.SafetensorError, OSError) as error:
        raise FormatError(f"{SINGLE_FILE}: cannot be read ({error}); copy it again") from error
