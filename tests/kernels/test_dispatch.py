"""kernels.dispatch: which kernel is called with what, without calling it."""

from dataclasses import dataclass, field
from types import SimpleNamespace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from matgptq_vllm.core.errors import UnsupportedError
from matgptq_vllm.kernels import dispatch
from matgptq_vllm.kernels.config import Config
from matgptq_vllm.kernels.wide_config import WideConfig

N, K, DENSE_FROM = 24, 64, 6
MAX_TOKENS = 9
CONFIG = Config(16, 64, 4, 2, split_k=3)
PLANES = [torch.empty(2, 1, 32, words, dtype=torch.int32) for words in (4, 2, 2, 4, 4)]
ROW_ORDER = torch.tensor([1, 2, 3, 0, 4, 5, 6, 7, 8], dtype=torch.int32)


@dataclass
class Kernels:
    """The kernels' stand-ins: what they were called with."""

    fused: list[tuple] = field(default_factory=list)
    dense: list[tuple] = field(default_factory=list)
    asked: list[tuple] = field(default_factory=list)

    def call(
        self, m: int, counts=(3, 6, 0), widths=(4, 8), host_decides: bool = True, x: torch.Tensor | None = None,
        max_width: int = 8,
    ):  # fmt: skip
        profile_widths = torch.tensor([8, 4, 8], dtype=torch.int32).clamp(max=max_width)
        return dispatch.sliced_linear(
            torch.randn(m, K).bfloat16() if x is None else x, PLANES, torch.ones(4, 1, 8, 2), N,
            torch.zeros(MAX_TOKENS, dtype=torch.int32), profile_widths, ROW_ORDER, torch.tensor(counts, dtype=torch.int32),
            profile_widths, torch.zeros(8, dtype=torch.int32), widths, 32, "nested", None, host_decides=host_decides,
        )  # fmt: skip


@pytest.fixture
def kernels(monkeypatch) -> Kernels:
    kernels = Kernels()

    def choose(*arguments: object) -> Config:
        kernels.asked.append(arguments)
        return CONFIG

    monkeypatch.setattr(dispatch.tuning, "choose", choose)
    monkeypatch.setattr(dispatch.tuning, "dense_from", lambda n, k, device: DENSE_FROM)
    monkeypatch.setattr(dispatch.gemm, "sliced_gemm", lambda *arguments: kernels.fused.append(arguments))
    monkeypatch.setattr(dispatch.dense, "dense_linear", lambda *arguments: kernels.dense.append(arguments))
    return kernels


def rows_given(kernels: Kernels) -> list[tuple[int, list[int] | None]]:
    ((_, _, _, n, k, rows, group_size, rule, _),) = kernels.dense
    assert (n, k, group_size, rule) == (N, K, 32, "nested")
    return [(width, None if of_width is None else of_width.tolist()) for width, of_width in rows]


def order_given(kernels: Kernels) -> torch.Tensor | None:
    assert kernels.dense == []
    ((_, _, _, n, _, _, _, group_size, rule, config, _, row_order, _, done),) = kernels.fused
    assert done is None
    assert (n, group_size, rule, config) == (N, 32, "nested", CONFIG)
    return row_order


def test_few_rows_take_the_fused_kernel_as_tuned_for_them(kernels: Kernels) -> None:
    kernels.call(DENSE_FROM - 1)
    assert order_given(kernels) is ROW_ORDER
    assert kernels.asked == [(DENSE_FROM - 1, N, K, (4, 8), 32, torch.device("cpu"), "nested")]


def test_planes_that_no_profile_reads_any_more_are_not_passed_on(kernels: Kernels) -> None:
    for max_width in (8, 4):
        kernels.call(3, max_width=max_width)
    kernels.call(3, widths=(4,))
    assert [len(arguments[1]) for arguments in kernels.fused] == [5, 3, 3]


def test_many_rows_are_computed_width_by_width(kernels: Kernels) -> None:
    kernels.call(9)
    assert rows_given(kernels) == [(8, [1, 2, 3]), (4, [0, 4, 5, 6, 7, 8])]
    assert kernels.fused == []


def test_many_rows_of_one_width_need_no_list(kernels: Kernels) -> None:
    kernels.call(7, counts=(2, 0, 5))
    assert rows_given(kernels) == [(8, None)]


def check_device_decides(kernels: Kernels, order: torch.Tensor | None) -> None:
    """All rows at the widest, then the narrower ones by the fused kernel."""
    ((*_, rows, _, _, _),) = kernels.dense
    ((width, of_width),) = rows
    assert of_width is None
    assert (width.widths, width.value.item()) == ((4, 8), 8)
    ((*_, row_order, _, done),) = kernels.fused
    assert row_order is order
    assert done[0] is width.value


def test_a_captured_graph_never_holds_what_the_host_decided(kernels: Kernels) -> None:
    kernels.call(9, host_decides=False)
    check_device_decides(kernels, ROW_ORDER)


def test_rows_that_are_not_the_steps_are_looked_up_on_the_device_in_no_order(kernels: Kernels) -> None:
    kernels.call(8)
    check_device_decides(kernels, None)


@pytest.fixture
def wide(kernels: Kernels, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """As on Hopper: rows of the calls of the product that is there for 4 to 8 rows."""
    rows: list[int] = []
    stand_in = SimpleNamespace(wide_gemm=lambda arranged, y, *_: rows.append(len(y)) or y)
    monkeypatch.setattr(dispatch, "_for_hopper", lambda: (None, stand_in))
    monkeypatch.setattr(dispatch, "wide_runs", lambda device: True)
    monkeypatch.setattr(dispatch, "wide_config", lambda *_: WideConfig(32, 1))
    monkeypatch.setattr(dispatch.arrange, "arrange", lambda *_: None)
    monkeypatch.setattr(dispatch, "prefers_small", lambda m, *_: m < 4)
    monkeypatch.setattr(dispatch, "WIDE_FROM", 4)
    monkeypatch.setattr(dispatch, "WIDE_TO", 8)
    return rows


def test_on_hopper_more_rows_of_several_widths_are_one_launch(kernels: Kernels, wide: list[int]) -> None:
    kernels.call(DENSE_FROM - 1)
    kernels.call(8, counts=(3, 5, 0))
    kernels.call(8, counts=(2, 6, 0), host_decides=False)
    kernels.call(8)  # rows that are not the step's
    assert wide == [DENSE_FROM - 1, 8, 8, 8]
    assert (kernels.dense, kernels.fused) == ([], [])


def test_on_hopper_rows_of_one_width_and_very_many_rows_are_expanded(kernels: Kernels, wide: list[int]) -> None:
    kernels.call(7, counts=(2, 0, 5))
    assert rows_given(kernels) == [(8, None)]
    kernels.dense.clear()
    kernels.call(9)
    assert rows_given(kernels) == [(8, [1, 2, 3]), (4, [0, 4, 5, 6, 7, 8])]
    kernels.dense.clear()
    kernels.call(9, host_decides=False)
    check_device_decides(kernels, ROW_ORDER)
    assert wide == []


def test_a_replica_of_one_width_looks_nothing_up(kernels: Kernels) -> None:
    kernels.call(3, widths=(4,))
    assert order_given(kernels) is None


def test_many_rows_of_such_a_replica_are_all_of_its_width_even_in_a_graph(kernels: Kernels) -> None:
    kernels.call(9, widths=(4,), host_decides=False)
    assert rows_given(kernels) == [(4, None)]


def test_no_rows_call_no_kernel(kernels: Kernels) -> None:
    assert kernels.call(0).shape == (0, N)
    assert (kernels.fused, kernels.dense) == ([], [])


def test_activations_that_the_kernels_cannot_multiply_are_refused(kernels: Kernels) -> None:
    with FakeTensorMode(), pytest.raises(UnsupportedError, match=r"activations are torch.float32; .* torch.bfloat16 or"):
        kernels.call(3, x=torch.empty(3, K, device="cuda"))
