"""Launch a Triton kernel that was compiled before, without what Triton does to find it.

For every call, Triton looks at each argument to tell which compiled kernel is meant, which takes the host longer than many
a kernel runs. Who launches one kernel hundreds of times per step knows that from a few things, and names them.
"""

from collections.abc import Hashable, Mapping
from typing import Any

from torch import Tensor

ALIGNMENT = 16
"""Bytes. Triton compiles one kernel for pointers that are multiples of it, and others for any."""


class Launcher:
    """One Triton function."""

    def __init__(self, function: Any) -> None:
        """
        Args:
            function: decorated by ``triton.jit``; its integers are not specialized.
        """
        self._function = function
        self._compiled: dict[Hashable, Any] = {}

    def launch(
        self, key: Hashable, programs: int, arguments: tuple[Any, ...], constants: Mapping[str, Any], **options: int
    ) -> None:
        """Launch ``programs`` programs.

        Args:
            key: whatever may differ between calls and selects the compiled kernel: types, device, constants, options.
            arguments: tensors and integers, in the function's order.
            constants: the function's other parameters, in its order.
        """
        if any(isinstance(argument, Tensor) and argument.data_ptr() % ALIGNMENT for argument in arguments):
            self._function[(programs,)](*arguments, **constants, **options)
            return
        compiled = self._compiled.get(key)
        if compiled is None:
            # Triton's interpreter returns none.
            self._compiled[key] = self._function[(programs,)](*arguments, **constants, **options)
        else:
            compiled[(programs, 1, 1)](*arguments, *constants.values())
