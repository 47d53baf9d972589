"""The driver half: one CPU "device" with one stream, there only when Triton interprets."""

import os
from typing import Any

import torch
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase


class InterpreterDriver(DriverBase):
    """Driver of the CPU as Triton's interpreter sees it."""

    def __init__(self) -> None:
        # DriverBase looks for a device here; there is none.
        pass

    @staticmethod
    def is_active() -> bool:
        # Without the interpreter nothing here can run a kernel, and vLLM must see that there is no Triton.
        return os.environ.get("TRITON_INTERPRET") == "1"

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cpu", 0, 1)

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def get_current_device(self) -> int:
        return 0

    def set_current_device(self, device: int) -> None:
        pass

    def get_current_stream(self, device: int | None = None) -> int:
        return 0

    def get_device_capability(self, device: int | None = None) -> tuple[int, int]:
        return (0, 0)

    def get_device_interface(self) -> Any:
        return torch.cpu


# As in compiler.py: benchmarking and launching belong to compiled kernels.
InterpreterDriver.__abstractmethods__ = frozenset()  # type: ignore[attr-defined]
