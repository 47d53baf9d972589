"""Launch a Triton kernel that was compiled before, without what Triton does to find it.

For every call, Triton looks at each argument to tell which compiled kernel is meant, which takes the host longer than many
a kernel runs. Who launches one kernel hundreds of times per step knows that from a few things, and names them.
"""

from collections.abc import Hashable, Mapping
from typing import Any

from torch import Tensor

ALIGNMENT = 16
"""Bytes. Triton compiles one kernel for pointers that are multiples of it, and others for any."""


def power_of_two(number: int) -> int:
    """The least that is not below ``number``, which is positive. Triton's own takes the host microseconds."""
    return 1 << (number - 1).bit_length()


class Launcher:
    """One Triton function."""

    def __init__(self, function: Any) -> None:
        """
        Args:
            function: decorated by ``triton.jit``.
        """
        self._function = function
        self._compiled: dict[Hashable, Any] = {}

    def launch(
        self,
        key: Hashable,
        grid: tuple[int, int, int],
        arguments: tuple[Any, ...],
        constants: Mapping[str, Any],
        **options: int,
    ) -> None:
        """Launch a grid of programs.

        Args:
            key: what beside ``constants`` and ``options`` may differ between calls and selects the compiled kernel: the device,
                types of arguments, integers that Triton may specialize.
            arguments: tensors, descriptors and integers, in the function's order.
            constants: the function's other parameters, in its order.
        """
        for argument in arguments:
            if isinstance(argument, Tensor) and argument.data_ptr() % ALIGNMENT:
                self._function[grid](*arguments, **constants, **options)
                return
        key = (key, *constants.values(), *options.values())
        compiled = self._compiled.get(key)
        if compiled is None:
            # Triton's interpreter returns none.
            self._compiled[key] = self._function[grid](*arguments, **constants, **options)
        else:
            compiled[grid](*arguments, *constants.values())
