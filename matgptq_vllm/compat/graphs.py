"""CUDA graphs of their own for decode batches of one profile; runner V2 only.

vLLM keys a graph by the shape of the batch and by one number of the step, how many LoRA adapters are active. Without LoRA
that number is free, and here it says which profile all rows have:

    number  graph of                           captured for
    0       steps of any profiles              every size and mode that vLLM captures
    1..n    steps of the n-th given profile    full decode graphs of the largest size in each of RANGES

A graph of one profile launches the kernels of one width, which look nothing up. Larger batches would need memory and time to
capture for little; they, and mixed ones, run the graphs of number 0. Within a range of RANGES products of any
number of rows take the same time, so that a smaller batch is filled up.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from vllm.config.compilation import CUDAGraphMode

from matgptq_vllm.engine.precision_state import PrecisionState

RANGES = (1, 4, 8, 16, 32, 64, 128, 256)
"""Ranges of requests, by their largest, in each of which kernels have one configuration."""

MAX_REQUESTS = RANGES[-1]
"""Requests of the largest batch with a graph of its own."""


def by_default(vllm_config: Any, runner: str, device: torch.device) -> bool:
    """Whether an operator who says nothing gets graphs keyed by profile: where vLLM captures whole decode steps."""
    mode = vllm_config.compilation_config.cudagraph_mode
    captures = device.type == "cuda" and mode is not None and mode.decode_mode() == CUDAGraphMode.FULL
    return captures and unsupported(vllm_config, runner) is None


def unsupported(vllm_config: Any, runner: str) -> str | None:
    """Why graphs cannot be keyed by profile in this engine; None if they can."""
    if runner != "v2":
        return "they need vLLM's model runner V2"
    if vllm_config.lora_config is not None:
        return "LoRA adapters use the key of the graphs"
    if vllm_config.parallel_config.data_parallel_size > 1:
        return "data-parallel ranks agree on a graph without knowing each other's profiles"
    if vllm_config.speculative_config is not None:
        return "with speculative decoding a step verifies several rows per request"
    return None


def key_by_profile(manager: Any, state: PrecisionState, profiles: Sequence[int]) -> None:
    """Make ``manager``, a ModelCudaGraphManager that has captured nothing yet, capture and choose graphs by profile.

    Args:
        state: steers what the layers launch while a graph is captured.
        profiles: indices of the profiles with graphs of their own.
    """
    manager.__class__ = type(f"MatGPTQ{type(manager).__name__}", (_ProfileGraphs, type(manager)), {})
    manager.precision_state = state
    manager.number_of_profile = {profile: number for number, profile in enumerate(profiles, start=1)}
    manager.step_profile = None
    captured = manager.compilation_config.cudagraph_capture_sizes or []
    # No larger decode step is captured.
    manager.sizes = sizes(size for size in captured if size <= manager.max_num_reqs)
    manager.list_graphs()


def sizes(captured: Iterable[int]) -> list[int]:
    """Of the sizes that vLLM captures, those of graphs of one profile: the largest in each of RANGES, ascending."""
    largest: dict[int, int] = {}
    for size in sorted(captured):
        of_range = next((end for end in RANGES if size <= end), None)
        if of_range is not None:
            largest[of_range] = size
    return list(largest.values())


class _ProfileGraphs:
    precision_state: PrecisionState
    number_of_profile: dict[int, int]
    step_profile: int | None
    """Profile of all rows of the coming step; None if they differ."""

    sizes: list[int]
    """Requests of the graphs of one profile, ascending."""

    def list_graphs(self: Any) -> None:
        """List again what is to be captured, with the graphs of every number."""
        self.lora_capture_cases = [0, *self.number_of_profile.values()]
        self._lora_dispatch_map, self._max_lora_case = self._build_lora_dispatch_map()
        self._candidates.clear()
        self._capture_descs.clear()
        self._init_candidates()
        for mode, descs in self._capture_descs.items():
            self._capture_descs[mode] = [desc for desc in descs if self._is_wanted(desc)]
        for key, descs in self._candidates.items():
            self._candidates[key] = [desc for desc in descs if self._is_wanted(desc)]

    def _is_wanted(self: Any, desc: Any) -> bool:
        return desc.num_active_loras == 0 or (desc.cg_mode == CUDAGraphMode.FULL and desc.num_tokens in self.sizes)

    def dispatch(self: Any, num_reqs: int, num_tokens: int, *args: Any, num_active_loras: int = 0, **kwargs: Any) -> Any:
        number = self.number_of_profile.get(self.step_profile, 0)
        size = next((size for size in self.sizes if size >= num_tokens), None)
        if number and size is not None:
            desc = super().dispatch(num_reqs, size, *args, num_active_loras=number, **kwargs)  # type: ignore[misc]
            if desc.cg_mode != CUDAGraphMode.NONE:
                return desc
        return super().dispatch(num_reqs, num_tokens, *args, num_active_loras=num_active_loras, **kwargs)  # type: ignore[misc]

    def capture(self: Any, *args: Any, **kwargs: Any) -> None:
        profile_of_number = {number: profile for profile, number in self.number_of_profile.items()}

        def prepare(number: int, num_reqs: int, num_tokens: int) -> None:
            self.precision_state.prepare_capture(profile_of_number.get(number))

        super().capture(*args, **{**kwargs, "lora_capture_hook": prepare})  # type: ignore[misc]
