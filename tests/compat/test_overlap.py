"""compat.overlap: on where GPUs can do it, and as the operator says where he says so."""

from types import SimpleNamespace

import pytest
from torch._inductor import config as inductor_config

from matgptq_vllm.compat import overlap
from matgptq_vllm.compat.overlap import OPTION, let_compiled_kernels_overlap


def config(given: dict[str, bool]) -> SimpleNamespace:
    return SimpleNamespace(compilation_config=SimpleNamespace(inductor_compile_config=given))


@pytest.mark.parametrize(("capability", "on"), [(80, False), (90, True), (100, True)])
def test_it_is_on_from_hopper_on(capability: int, on: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    platform = SimpleNamespace(has_device_capability=lambda wanted: capability >= wanted)
    monkeypatch.setattr(overlap, "current_platform", platform)
    given = config({})
    assert let_compiled_kernels_overlap(given) is on
    assert given.compilation_config.inductor_compile_config == ({OPTION: True} if on else {})


def test_the_operator_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(overlap, "current_platform", SimpleNamespace(has_device_capability=lambda wanted: True))
    given = config({OPTION: False})
    assert not let_compiled_kernels_overlap(given)
    assert given.compilation_config.inductor_compile_config == {OPTION: False}


def test_a_torch_without_it_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(overlap, "current_platform", SimpleNamespace(has_device_capability=lambda wanted: True))
    monkeypatch.setattr(overlap, "inductor_config", SimpleNamespace(triton=SimpleNamespace()))
    given = config({})
    assert not let_compiled_kernels_overlap(given)
    assert given.compilation_config.inductor_compile_config == {}


def test_torch_knows_the_option() -> None:
    assert hasattr(inductor_config.triton, OPTION.removeprefix("triton."))
