"""CUDA graphs of their own for decode batches of one profile; runner V2 only.

vLLM keys a graph by the shape of the batch and by one number of the step, how many LoRA adapters are active. Without LoRA
that number is free, and here it says which profile all rows have:

    number  graph of                           captured for
    0       steps of any profiles              every size and mode that vLLM captures
    1..n    steps of the n-th given profile    full decode graphs of up to MAX_REQUESTS requests

A graph of one profile launches the kernels of one width, which look nothing up. Larger batches gain too little to be worth
the memory and the time to capture; they, and mixed ones, run the graphs of number 0.
"""

from collections.abc import Sequence
from typing import Any

from vllm.config.compilation import CUDAGraphMode

from matgptq_vllm.engine.precision_state import PrecisionState

MAX_REQUESTS = 64
"""Requests of the largest batch with a graph of its own."""


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
    manager.list_graphs()


class _ProfileGraphs:
    precision_state: PrecisionState
    number_of_profile: dict[int, int]
    step_profile: int | None
    """Profile of all rows of the coming step; None if they differ."""

    def list_graphs(self: Any) -> None:
        """List again what is to be captured, with the graphs of every number."""
        self.lora_capture_cases = [0, *self.number_of_profile.values()]
        self._lora_dispatch_map, self._max_lora_case = self._build_lora_dispatch_map()
        self._candidates.clear()
        self._capture_descs.clear()
        self._init_candidates()
        for mode, descs in self._capture_descs.items():
            self._capture_descs[mode] = [desc for desc in descs if _is_wanted(desc)]
        for key, descs in self._candidates.items():
            self._candidates[key] = [desc for desc in descs if _is_wanted(desc)]

    def dispatch(self: Any, *args: Any, num_active_loras: int = 0, **kwargs: Any) -> Any:
        number = self.number_of_profile.get(self.step_profile, 0)
        if number:
            desc = super().dispatch(*args, num_active_loras=number, **kwargs)  # type: ignore[misc]
            if desc.cg_mode != CUDAGraphMode.NONE:
                return desc
        return super().dispatch(*args, num_active_loras=num_active_loras, **kwargs)  # type: ignore[misc]

    def capture(self: Any, *args: Any, **kwargs: Any) -> None:
        profile_of_number = {number: profile for profile, number in self.number_of_profile.items()}

        def prepare(number: int, num_reqs: int, num_tokens: int) -> None:
            self.precision_state.prepare_capture(profile_of_number.get(number))

        super().capture(*args, **{**kwargs, "lora_capture_hook": prepare})  # type: ignore[misc]


def _is_wanted(desc: Any) -> bool:
    return desc.num_active_loras == 0 or (desc.cg_mode == CUDAGraphMode.FULL and desc.num_tokens <= MAX_REQUESTS)
