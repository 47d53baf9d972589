"""Kernels of torch.compile that start before the one before them ends, as this project's kernels do: programmatic dependent
launch (PDL). Between two products of a model are norms and activations; if none of these lets the next kernel start, no product
reads its weights early."""

from typing import Any

from torch._inductor import config as inductor_config
from vllm.platforms import current_platform

OPTION = "triton.enable_pdl"
"""Of the inductor; an operator sets it in ``--compilation-config``, under "inductor_compile_config"."""

FIRST_CAPABILITY = 90
"""Compute capability, times ten, from which GPUs have it."""


def let_compiled_kernels_overlap(vllm_config: Any) -> bool:
    """Turn it on for the model that ``vllm_config`` is about to compile, unless the operator decides; whether it is on."""
    if not current_platform.has_device_capability(FIRST_CAPABILITY) or not hasattr(inductor_config.triton, "enable_pdl"):
        return False
    return bool(vllm_config.compilation_config.inductor_compile_config.setdefault(OPTION, True))
