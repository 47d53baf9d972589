"""Replica: one parent as one engine serves it: which profiles, at most how wide, and the buffers that steer every layer."""

import hashlib
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path

import torch

from matgptq_vllm.core.checkpoint import ParentReader
from matgptq_vllm.core.errors import InputError, UnsupportedError
from matgptq_vllm.core.manifest import read_manifest
from matgptq_vllm.core.precision import WIDTHS
from matgptq_vllm.core.profile import PROFILES_FILE
from matgptq_vllm.core.quality import read_perplexities
from matgptq_vllm.core.replica import ReplicaOptions, parse_bytes
from matgptq_vllm.core.resident_bytes import ResidentBytes, resident_bytes
from matgptq_vllm.core.storage import profile_bytes
from matgptq_vllm.engine.cuda_memory import CudaMemory
from matgptq_vllm.engine.elastic import ElasticPlanes
from matgptq_vllm.engine.plane_memory import HostMemory, PlaneMemory
from matgptq_vllm.engine.step_buffers import StepBuffers

MAX_PROFILES = 256
"""Profiles that a replica can hold. Tables per profile have this size whatever their number, because vLLM keeps compiled
graphs between runs by a key that does not know the parent's profile table."""


class Replica:
    """A parent opened for serving. Every process of an engine opens its own and reaches the same profile indices.

    Args:
        directory: the parent.
        options: what the operator decided.
        kernel_layout: whether layers are held in the kernel layout.
        itemsize: bytes of a weight that is not quantized; None: as stored.

    Raises:
        FormatError: the folder is not a whole parent.
        InputError: the options ask for what the parent does not have.
    """

    def __init__(
        self, directory: str | Path, options: ReplicaOptions, kernel_layout: bool = False, itemsize: int | None = None
    ):
        self.reader = ParentReader(directory)
        self.memory_reason: str | None = None
        """Why a memory budget led to the max width; None without one."""
        self._kernel_layout, self._itemsize = kernel_layout, itemsize
        if options.memory_budget is not None:
            limit, options = options.max_width, options.within_budget(self.resident)
            self.memory_reason = self.resident.reason(parse_bytes(options.memory_budget or 0), options.max_width, limit)
        self.options = options
        """With the max width that the memory budget led to."""
        self.profiles = self.reader.profiles(options.max_width)
        if len(self.profiles) > MAX_PROFILES:
            raise InputError(
                f"{directory} has {len(self.profiles)} profiles for max width {options.max_width}, a replica can hold "
                f"{MAX_PROFILES}; remove some from {PROFILES_FILE}"
            )
        self.catalogue = options.catalogue(self.profiles)
        self.num_planes = self.reader.num_planes(options.max_width)
        self._step_buffers: StepBuffers | None = None
        self.elastic: ElasticPlanes | None = None
        """What can be dropped while the engine runs; None if nothing can."""

    def make_elastic(self, device: torch.device) -> None:
        """Hold planes such that they can be dropped; to be called before layers are made. UnsupportedError: not there."""
        if device.type == "cpu":
            memories: Callable[[int], PlaneMemory] = lambda _: HostMemory()  # noqa: E731
        elif device.type == "cuda" and self._kernel_layout:
            memories = lambda plane: CudaMemory(device, self.resident.planes[plane])  # noqa: E731
        else:
            # In plain torch every width is computed for all rows, so all planes are read in every step.
            raise UnsupportedError(f"planes on {device} cannot be dropped without the kernels, which multiply 16-bit types")
        self.elastic = ElasticPlanes(self.resident.plane_widths, self.reader.spec.slice_rule, self.options.max_width, memories)

    def new_plane(self, plane: int, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """Memory for a layer's part of ``plane`` as it stays in memory, on torch's default device."""
        elastic = None if self.elastic is None else self.elastic.new_tensor(plane, shape, dtype)
        return torch.empty(tuple(shape), dtype=dtype) if elastic is None else elastic

    @cached_property
    def resident(self) -> ResidentBytes:
        """Bytes of weights at every max width."""
        return resident_bytes(self.reader, self._kernel_layout, self._itemsize)

    @property
    def widths(self) -> list[int]:
        """Widths that this replica can hold."""
        return [width for width in WIDTHS if width <= self.options.max_width]

    @property
    def max_widths(self) -> dict[str, int]:
        """Width that every profile needs at most in any layer."""
        return {profile.name: profile.max_width for profile in self.profiles}

    def step_buffers(self, max_tokens: int, device: torch.device) -> StepBuffers:
        """The buffers that all layers share, for steps of up to ``max_tokens`` rows. Made by the first call."""
        if self._step_buffers is None:
            self._step_buffers = StepBuffers(max_tokens, MAX_PROFILES, self.catalogue.index(None), device)
        return self._step_buffers

    def profile_widths(self, layers: Sequence[str]) -> torch.Tensor:
        """int32 [MAX_PROFILES], on the CPU: width of ``layers``, the members of one fused layer, in every profile.

        Profiles are in the order of their indices. Entries that belong to no profile have the default profile's width.
        """
        widths = [profile.width_of(layers) for profile in self.profiles]
        default = widths[self.catalogue.index(None)]
        return torch.tensor(widths + [default] * (MAX_PROFILES - len(widths)), dtype=torch.int32, device="cpu")

    def digest(self) -> str:
        """Hexadecimal digest of the whole parent, through its manifest."""
        return hashlib.sha256(read_manifest(self.reader.directory).to_json().encode()).hexdigest()

    def average_bits(self) -> dict[str, float]:
        """Mean bits per weight of every profile."""
        num_weights = self.reader.num_weights
        return {profile.name: profile.average_bits(num_weights) for profile in self.profiles}

    def perplexities(self) -> dict[str, float]:
        """Perplexity of the profiles that the parent's evaluation report has; FormatError if the report is damaged."""
        return read_perplexities(self.reader.directory)

    def bytes_per_weight(self) -> dict[str, float]:
        """Mean bytes read per weight by every profile, scales included."""
        total = sum(self.reader.num_weights.values())
        return {profile.name: profile_bytes(self.reader, profile) / total for profile in self.profiles}
