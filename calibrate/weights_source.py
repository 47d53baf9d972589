"""Where the weights of a model come from: one tensor at a time, so that no more than a block need be in memory."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from matgptq_vllm.core.errors import InputError

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"


class WeightsSource(Protocol):
    """Reads weights by their name in the model."""

    def read(self, name: str) -> torch.Tensor:
        """The weight as stored: its own type, any device."""
        ...


class SafetensorsSource:
    """The weights in a model folder: ``model.safetensors``, or the shards that ``model.safetensors.index.json`` lists.

    Names may differ from the model's by the prefix of the base model (``model.``), and tied weights may be stored under
    any of their names.

    Args:
        directory: the model folder.
        model: its skeleton.

    Raises:
        InputError: no such files, files that are damaged, or weights that are missing or of another shape.
    """

    def __init__(self, directory: Path, model: nn.Module):
        self._directory = directory
        self.files = _weight_files(directory)
        """Names of the files in the folder."""
        file_of, shapes = self._scan()
        self._stored_names: dict[str, str] = {}
        self._file_of = file_of
        prefix = f"{getattr(model, 'base_model_prefix', '') or 'model'}."
        absent = []
        for names, shape in _expected(model):
            stored = next((name for name in _spellings(names, prefix) if name in file_of), None)
            if stored is None or shapes[stored] != shape:
                absent.append(names[0])
            else:
                self._stored_names.update(dict.fromkeys(names, stored))
        if absent:
            raise InputError(
                f"{directory}: weights are missing or of another shape: {', '.join(absent[:4])}; copy the model again"
            )

    def read(self, name: str) -> torch.Tensor:
        """The weight, on the CPU; its bytes may be those of the mapped file, so it must not be changed."""
        stored = self._stored_names[name]
        try:
            # Opened for every tensor: an open file would keep all pages ever read in this process's memory.
            with safe_open(self._directory / self._file_of[stored], framework="pt") as file:
                return file.get_tensor(stored)
        except (SafetensorError, OSError) as error:
            raise InputError(f"{self._directory}: its weights cannot be loaded: {stored}: {error}") from error

    def _scan(self) -> tuple[dict[str, str], dict[str, tuple[int, ...]]]:
        """File and shape of every stored tensor."""
        file_of: dict[str, str] = {}
        shapes: dict[str, tuple[int, ...]] = {}
        for name in self.files:
            try:
                with safe_open(self._directory / name, framework="pt") as file:
                    for key in file.keys():  # noqa: SIM118 (a file is no mapping)
                        file_of[key] = name
                        shapes[key] = tuple(file.get_slice(key).get_shape())
            except (SafetensorError, OSError) as error:
                raise InputError(f"{self._directory}: its weights cannot be loaded: {name}: {error}") from error
        return file_of, shapes


def unquantized(model: nn.Module, source: WeightsSource, quantized: set[str]) -> Iterator[tuple[str, torch.Tensor]]:
    """Name in the model and tensor as stored of every weight that is not a quantized layer's; tied ones once.

    Args:
        model: the skeleton.
        quantized: names of the quantized layers; their biases are other weights.
    """
    for names, _ in _expected(model):
        if not names[0].endswith(".weight") or names[0].removesuffix(".weight") not in quantized:
            yield names[0], source.read(names[0])


def _expected(model: nn.Module) -> Iterator[tuple[list[str], tuple[int, ...]]]:
    """Names and shape of every parameter and persistent buffer; tied ones come once, with all their names."""
    persistent = model.state_dict().keys()
    names_of: dict[int, list[str]] = {}
    tensors: dict[int, torch.Tensor] = {}
    for name, tensor in (
        *model.named_parameters(remove_duplicate=False),
        *((name, buffer) for name, buffer in model.named_buffers(remove_duplicate=False) if name in persistent),
    ):
        names_of.setdefault(id(tensor), []).append(name)
        tensors[id(tensor)] = tensor
    for key, names in names_of.items():
        yield names, tuple(tensors[key].shape)


def _spellings(names: list[str], prefix: str) -> Iterator[str]:
    """The names under which a weight may be stored, best first."""
    yield from names
    for name in names:
        yield name.removeprefix(prefix) if name.startswith(prefix) else prefix + name


def _weight_files(directory: Path) -> list[str]:
    if (directory / INDEX_FILE).is_file():
        try:
            index: Mapping[str, Mapping[str, str]] = json.loads((directory / INDEX_FILE).read_text(encoding="utf-8"))
            files = sorted(set(index["weight_map"].values()))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise InputError(f"{directory}: its weights cannot be loaded: {INDEX_FILE} is no index; copy it again") from error
    else:
        files = [SINGLE_FILE]
    for name in files:
        if not (directory / name).is_file():
            raise InputError(
                f"{directory}: its weights cannot be loaded: {name} is missing; "
                "only safetensors files are read, so copy them all, or convert the model"
            )
    return files
