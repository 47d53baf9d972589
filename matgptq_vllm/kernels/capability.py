"""Which NVIDIA GPUs the kernels run on. Imports no torch."""

from matgptq_vllm.core.errors import UnsupportedError

MIN_CAPABILITY = (8, 0)
"""Compute capability 8.0: the oldest GPUs with bfloat16 arithmetic."""


def check_capability(name: str, found: tuple[int, int], needs: str = "the kernels need") -> None:
    """UnsupportedError if the GPU ``name``, of compute capability ``found``, is too old.

    Args:
        needs: subject and verb of the message.
    """
    if found < MIN_CAPABILITY:
        least = ".".join(map(str, MIN_CAPABILITY))
        raise UnsupportedError(
            f"{name} has compute capability {found[0]}.{found[1]}; {needs} {least} or more (Ampere, Ada, Hopper, Blackwell). "
            "Use such a GPU, or vLLM's CPU build"
        )
