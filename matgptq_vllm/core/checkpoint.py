"""Read a parent: a Hugging Face folder whose safetensors shards are grouped into one file set per plane.

File sets, each in shards ``{set}-{i:05}-of-{n:05}.safetensors``:

    set             tensors
    model           ``{layer}.scales`` [N, groups], and every weight that is not quantized
    planes/plane0   ``{layer}.plane0`` uint8 [N, packed K]: the most significant plane of every layer
    planes/plane1.. likewise, each needed only by wider slices

A replica that reads at most r bits opens ``model`` and the planes that hold the top r bits, no other file. The writer
is ``core.checkpoint_writer``; the contract in prose is docs/format.md.
"""

from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path

import safetensors
import torch

from matgptq_vllm.core.digest import digest
from matgptq_vllm.core.errors import FormatError
from matgptq_vllm.core.manifest import CONFIG_FILE, INDEX_FILE, MANIFEST_FILE, PLANES_FOLDER, read_index
from matgptq_vllm.core.parent import SCALES as SCALES
from matgptq_vllm.core.planes import PlaneLayout
from matgptq_vllm.core.precision import PARENT_WIDTH
from matgptq_vllm.core.profile import PROFILES_FILE
from matgptq_vllm.core.quality import QUALITY_FILE
from matgptq_vllm.core.read_ahead import in_order
from matgptq_vllm.core.safetensors_header import read_header
from matgptq_vllm.core.slicing import bits_read, check_rule
from matgptq_vllm.core.summary import ParentSummary

MODEL_SET = "model"
METADATA_FILES = (CONFIG_FILE, INDEX_FILE, MANIFEST_FILE, PROFILES_FILE, QUALITY_FILE)


def plane_name(plane: int) -> str:
    """Name of the tensor of plane ``plane`` within a layer."""
    return f"plane{plane}"


def plane_set(plane: int) -> str:
    """Name of the file set of plane ``plane``."""
    return f"{PLANES_FOLDER}/{plane_name(plane)}"


class ParentReader(ParentSummary):
    """A parent on disk, opened for reading. Tensors are read when asked for, never before.

    Raises (from the constructor and every method):
        InputError: there is no such folder.
        FormatError: the folder is not a whole parent; the message names the file, and the tensor if it is one.
    """

    def __init__(self, directory: str | Path):
        super().__init__(directory)
        self.layout = PlaneLayout(self.spec.plane_widths)

    @cached_property
    def _index(self) -> dict[str, str]:
        index = read_index(self.directory)
        if index.keys() != self._sha256.keys():
            names = sorted(index.keys() ^ self._sha256.keys())
            raise FormatError(f"{INDEX_FILE}: its tensors differ from {MANIFEST_FILE}'s: {names[:4]}; one was altered")
        return index

    def num_planes(self, max_width: int) -> int:
        """Leading planes that a replica of ``max_width`` reads."""
        return self.layout.num_planes(bits_read(max_width, check_rule(self.spec.slice_rule)))

    def files(self, max_width: int = PARENT_WIDTH) -> list[str]:
        """Paths, within the parent, of the weight files that a replica of ``max_width`` opens."""
        return sorted({self._index[name] for name in self._wanted(max_width)})

    def tensors(self, max_width: int = PARENT_WIDTH) -> Iterator[tuple[str, torch.Tensor]]:
        """Name and CPU tensor of everything that a replica of ``max_width`` holds, each checked against its digest.

        Several are read and checked at a time, by threads.
        """
        wanted = self._wanted(max_width)
        for file in self.files(max_width):
            yield from self._read(file, [name for name, where in self._index.items() if where == file and name in wanted])

    def plane(self, layer: str, plane: int) -> torch.Tensor:
        """One plane of a layer, uint8 [N, packed K], on the CPU, checked against its digest. Threads may call this."""
        return self._tensor(f"{layer}.{plane_name(plane)}")

    def layer(self, name: str, max_width: int = PARENT_WIDTH) -> tuple[torch.Tensor, torch.Tensor]:
        """Codes (uint8 [N, K], bits beyond ``max_width`` 0 where their planes were not read) and scales of one layer."""
        planes = [self._tensor(f"{name}.{plane_name(plane)}") for plane in range(self.num_planes(max_width))]
        return self.layout.join(planes, self.layers[name][1]), self._tensor(f"{name}.{SCALES}")

    def unquantized(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Name and CPU tensor of every weight that is not quantized."""
        quantized = self._quantized_names()
        for file in sorted(set(self._index.values())):
            names = [name for name, where in self._index.items() if where == file and name not in quantized]
            if names:
                yield from self._read(file, names)

    def _tensor(self, name: str) -> torch.Tensor:
        if name not in self._index:
            raise FormatError(f"{INDEX_FILE}: tensor {name!r} is missing; one of the parent's files was altered")
        return next(self._read(self._index[name], [name]))[1]

    def _read(self, file: str, names: Sequence[str]) -> Iterator[tuple[str, torch.Tensor]]:
        path = self.directory / file
        read_header(self.directory, file)
        try:
            with safetensors.safe_open(str(path), framework="pt", device="cpu") as shard:
                held = set(shard.keys())

                def read(name: str) -> tuple[str, torch.Tensor]:
                    if name not in held:
                        raise FormatError(f"{file}: has no tensor {name!r}, which {INDEX_FILE} promises; copy it again")
                    tensor = shard.get_tensor(name)
                    self._check(file, name, tensor)
                    return name, tensor

                yield from map(read, names) if len(names) == 1 else in_order(read, names)
        except (safetensors.SafetensorError, OSError) as error:
            raise FormatError(f"{file}: cannot be read ({error}); copy it again") from error

    def _check(self, file: str, name: str, tensor: torch.Tensor) -> None:
        if digest(tensor) != self._sha256.get(name):
            raise FormatError(
                f"{file}: tensor {name!r} is not what calibration wrote (its SHA-256 differs from {MANIFEST_FILE}); "
                "copy the file again"
            )

    def _quantized_names(self) -> set[str]:
        parts = [SCALES, *(plane_name(plane) for plane in range(len(self.spec.plane_widths)))]
        return {f"{layer}.{part}" for layer in self.layers for part in parts}

    def _wanted(self, max_width: int) -> set[str]:
        beyond = range(self.num_planes(max_width), len(self.spec.plane_widths))
        unread = {f"{layer}.{plane_name(plane)}" for layer in self.layers for plane in beyond}
        return self._index.keys() - unread
