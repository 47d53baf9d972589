"""Replica: one parent as one engine serves it: which profiles, at most how wide, and the buffers that steer every layer."""

import hashlib
from collections.abc import Sequence
from pathlib import Path

import torch

from matgptq_vllm.core.checkpoint import ParentReader
from matgptq_vllm.core.errors import InputError
from matgptq_vllm.core.manifest import read_manifest
from matgptq_vllm.core.profile import PROFILES_FILE
from matgptq_vllm.core.quality import read_perplexities
from matgptq_vllm.core.replica import ReplicaOptions
from matgptq_vllm.core.storage import profile_bytes
from matgptq_vllm.engine.step_buffers import StepBuffers

MAX_PROFILES = 256
"""Profiles that a replica can hold. Tables per profile have this size whatever their number, because vLLM keeps compiled
graphs between runs by a key that does not know the parent's profile table."""


class Replica:
    """A parent opened for serving. Every process of an engine opens its own and reaches the same profile indices.

    Args:
        directory: the parent.
        options: what the operator decided.

    Raises:
        FormatError: the folder is not a whole parent.
        InputError: the options ask for what the parent does not have.
    """

    def __init__(self, directory: str | Path, options: ReplicaOptions):
        self.reader = ParentReader(directory)
        self.options = options
        self.profiles = self.reader.profiles(options.max_width)
        if len(self.profiles) > MAX_PROFILES:
            raise InputError(
                f"{directory} has {len(self.profiles)} profiles for max width {options.max_width}, a replica can hold "
                f"{MAX_PROFILES}; remove some from {PROFILES_FILE}"
            )
        self.catalogue = options.catalogue(self.profiles)
        self.num_planes = self.reader.num_planes(options.max_width)
        self._step_buffers: StepBuffers | None = None

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
