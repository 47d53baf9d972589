"""kernels.launch: when Triton is asked which compiled kernel is meant, and when a known one is launched."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from matgptq_vllm.kernels.launch import Launcher, power_of_two

GRID = (2, 1, 1)
ALIGNED = torch.zeros(64)
CONSTANTS = {"WIDTH": 4, "RULE": "nested"}


class Calls(list[tuple[str, tuple[int, int, int], tuple[Any, ...], dict[str, Any]]]):
    """What was launched: by Triton's search, or the compiled kernel of a number."""


class Compiled:
    def __init__(self, calls: Calls, number: int):
        self.calls, self.number = calls, number

    def __getitem__(self, grid: tuple[int, int, int]) -> Callable[..., None]:
        return lambda *arguments: self.calls.append((f"kernel {self.number}", grid, arguments, {}))


class Function:
    """As ``triton.jit`` makes one; in the interpreter it compiles nothing."""

    def __init__(self, calls: Calls, compiles: bool = True):
        self.calls, self.compiles = calls, compiles

    def __getitem__(self, grid: tuple[int, int, int]) -> Callable[..., Compiled | None]:
        def call(*arguments: Any, **named: Any) -> Compiled | None:
            self.calls.append(("search", grid, arguments, named))
            return Compiled(self.calls, len(self.calls)) if self.compiles else None

        return call


@pytest.fixture
def calls() -> Calls:
    return Calls()


def test_a_kernel_is_searched_once_and_then_gets_all_parameters_by_position(calls: Calls) -> None:
    launcher = Launcher(Function(calls))
    for rows in (3, 5):
        launcher.launch("a", GRID, (ALIGNED, rows), CONSTANTS, num_warps=4)
    assert calls == [
        ("search", GRID, (ALIGNED, 3), {**CONSTANTS, "num_warps": 4}),
        ("kernel 1", GRID, (ALIGNED, 5, 4, "nested"), {}),
    ]


@pytest.mark.parametrize(
    ("key", "constants", "num_warps"),
    [("b", CONSTANTS, 4), ("a", {**CONSTANTS, "WIDTH": 8}, 4), ("a", CONSTANTS, 8)],
    ids=["key", "constant", "option"],
)
def test_whatever_selects_a_kernel_is_searched_for(calls: Calls, key: str, constants: dict[str, Any], num_warps: int) -> None:
    launcher = Launcher(Function(calls))
    launcher.launch("a", GRID, (ALIGNED,), CONSTANTS, num_warps=4)
    launcher.launch(key, GRID, (ALIGNED,), constants, num_warps=num_warps)
    assert [call[0] for call in calls] == ["search", "search"]


def test_pointers_that_are_not_aligned_are_left_to_triton_and_not_remembered(calls: Calls) -> None:
    launcher = Launcher(Function(calls))
    for tensor in (ALIGNED[1:], ALIGNED, ALIGNED[1:]):
        launcher.launch("a", GRID, (tensor,), CONSTANTS)
    launcher.launch("a", GRID, (ALIGNED,), CONSTANTS)
    assert [call[0] for call in calls] == ["search", "search", "search", "kernel 2"]


def test_the_interpreter_compiles_nothing_to_remember(calls: Calls) -> None:
    launcher = Launcher(Function(calls, compiles=False))
    for _ in range(2):
        launcher.launch("a", GRID, (ALIGNED,), CONSTANTS)
    assert [call[0] for call in calls] == ["search", "search"]


@pytest.mark.parametrize(("number", "expected"), [(1, 1), (2, 2), (3, 4), (16, 16), (257, 512), (1024, 1024)])
def test_powers_of_two(number: int, expected: int) -> None:
    assert power_of_two(number) == expected
