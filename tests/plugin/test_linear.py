"""plugin.linear: what a layer holds before and after loading, and what it hands to the operator."""

import dataclasses
import weakref
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from vllm.lora.layers.utils import _get_lora_device
from vllm.model_executor import parameter as vllm_parameter

from matgptq_vllm.core.checkpoint import plane_name
from matgptq_vllm.core.errors import UnsupportedError
from matgptq_vllm.core.replica import ReplicaOptions
from matgptq_vllm.engine.replica import Replica
from matgptq_vllm.kernels import dispatch
from matgptq_vllm.kernels.layout import to_kernel_layout
from matgptq_vllm.kernels.ops import register_ops
from matgptq_vllm.plugin import linear

MEMBERS = [f"model.layers.0.mlp.{name}_proj" for name in ("gate", "up")]
MAX_TOKENS = 16


@pytest.fixture
def replica(profiled_parent: Path, monkeypatch) -> Replica:
    register_ops()
    scheduler_config = SimpleNamespace(max_num_batched_tokens=MAX_TOKENS)
    monkeypatch.setattr(linear, "get_current_vllm_config", lambda: SimpleNamespace(scheduler_config=scheduler_config))
    monkeypatch.setattr(vllm_parameter, "get_tensor_model_parallel_rank", lambda: 0)
    monkeypatch.setattr(vllm_parameter, "get_tensor_model_parallel_world_size", lambda: 1)
    return Replica(profiled_parent, ReplicaOptions(max_width=4))


def loaded(replica: Replica, dtype: torch.dtype) -> tuple[linear.MatGPTQLinearMethod, torch.nn.Module]:
    """The fused layer of MEMBERS with the parent's weights, as vLLM leaves it before ``process_weights_after_loading``."""
    method, layer = linear.MatGPTQLinearMethod(replica, MEMBERS), torch.nn.Module()
    (n, k) = replica.reader.layers[MEMBERS[0]]
    method.create_weights(layer, k, [n, n], k, 2 * n, dtype, weight_loader=lambda *_: None)
    tensors = dict(replica.reader.tensors(4))
    for name, held in layer.named_parameters():
        held.data.copy_(torch.cat([tensors[f"{member}.{name}"] for member in MEMBERS]))
    return method, layer


def weights(layer: torch.nn.Module) -> list[torch.nn.Parameter]:
    return [layer.get_parameter(name) for name in (*map(plane_name, range(3)), "scales")]


def test_on_a_cpu_a_layer_stays_as_it_was_loaded_and_computes_in_plain_torch(replica: Replica) -> None:
    method, layer = loaded(replica, torch.float32)
    before = weights(layer)
    method.process_weights_after_loading(layer)
    assert all(a is b for a, b in zip(weights(layer), before, strict=True))
    x, bias = torch.randn(2, 3, replica.reader.layers[MEMBERS[0]][1]), torch.randn(method._n)
    y = method.apply(layer, x)
    assert y.shape == (2, 3, method._n)
    torch.testing.assert_close(method.apply(layer, x, bias), y + bias)


def test_for_the_kernels_a_layer_gives_up_what_was_loaded(replica: Replica, monkeypatch) -> None:
    method, layer = loaded(replica, torch.bfloat16)
    *planes, scales = (held.data.clone() for held in weights(layer))
    gone = [weakref.ref(held) for held in weights(layer)]
    asked = []
    monkeypatch.setattr(linear, "kernels_run", lambda *arguments: asked.append(arguments) or True)
    method.process_weights_after_loading(layer)
    assert asked == [(torch.device("cpu"), torch.bfloat16)]
    assert [held() for held in gone] == [None] * 4
    spec, (_, k) = replica.reader.spec, replica.reader.layers[MEMBERS[0]]
    wanted, wanted_scales = to_kernel_layout(planes, scales, replica.reader.layout, k, spec.group_size)
    for found, tensor in zip(weights(layer), [*wanted, wanted_scales], strict=True):
        assert torch.equal(found, tensor)
        assert not found.requires_grad
    assert layer.locks.numel() > 0
    assert not layer.locks.any()
    assert not set(layer.state_dict()) - {"plane0", "plane1", "plane2", "scales"}


def test_what_the_kernels_read_can_be_made_again_from_weights_that_are_read_again(replica: Replica, monkeypatch) -> None:
    monkeypatch.setattr(linear, "kernels_run", lambda *_: True)
    method, layer = loaded(replica, torch.bfloat16)
    at_first = {name: held.data.clone() for name, held in layer.named_parameters()}
    method.process_weights_after_loading(layer)
    wanted = [held.data.clone() for held in weights(layer)]
    # vLLM gives the layer the parameters of ``create_weights`` again, and fills them.
    for name, data in at_first.items():
        setattr(layer, name, torch.nn.Parameter(data, requires_grad=False))
    method.process_weights_after_loading(layer)
    assert all(torch.equal(found, tensor) for found, tensor in zip(weights(layer), wanted, strict=True))


def test_loras_find_the_device_of_a_layer(replica: Replica) -> None:
    _, layer = loaded(replica, torch.float32)
    assert _get_lora_device(layer) == layer.scales.device
    assert "qweight" not in layer.state_dict()


def test_the_kernels_are_given_the_buffers_of_the_step_and_the_bias(replica: Replica, monkeypatch) -> None:
    method, layer = loaded(replica, torch.bfloat16)
    monkeypatch.setattr(linear, "kernels_run", lambda *_: True)
    method.process_weights_after_loading(layer)
    given: list = []

    def product(x: torch.Tensor, *rest: object) -> torch.Tensor:
        given.extend(rest)
        return x.new_zeros(x.shape[0], method._n)

    monkeypatch.setattr(dispatch, "sliced_linear", product)
    bias = torch.randn(method._n)
    y = method.apply(layer, torch.randn(5, replica.reader.layers[MEMBERS[0]][1]).bfloat16(), bias)
    assert y.shape == (5, method._n)
    planes, scales, n, *tensors, widths, group_size, rule, given_bias, host_decides = given
    step = replica.step_buffers(MAX_TOKENS, torch.device("cpu"))
    wanted = [
        step.token_profiles, layer.profile_widths, step.row_order, step.step_profiles, layer.host_profile_widths, layer.locks
    ]  # fmt: skip
    assert [tensor.data_ptr() for tensor in tensors] == [tensor.data_ptr() for tensor in wanted]
    assert [tensor.data_ptr() for tensor in (*planes, scales)] == [tensor.data_ptr() for tensor in weights(layer)]
    assert (n, widths, group_size, host_decides) == (method._n, [2, 3, 4], replica.reader.spec.group_size, True)
    assert rule == replica.reader.spec.slice_rule
    assert given_bias.data_ptr() == bias.data_ptr()


def test_each_profile_has_its_width_on_the_host_too(replica: Replica) -> None:
    _, layer = loaded(replica, torch.bfloat16)
    assert layer.host_profile_widths.is_cpu
    assert torch.equal(layer.host_profile_widths, layer.profile_widths.cpu())
    assert layer.host_profile_widths[: len(replica.profiles)].tolist() == [
        profile.width_of(MEMBERS) for profile in replica.profiles
    ]


@pytest.mark.parametrize(
    ("group_size", "k", "instead"), [(128, 192, "1 or 2 or 3"), (-1, 764, "1"), (32, 48, "1 or 2 or 3 or 4 or 6 or 8 or 12")]
)
def test_ranks_that_would_share_a_group_or_a_byte_are_refused(replica: Replica, group_size: int, k: int, instead: str) -> None:
    method = of_group_size(replica, group_size)
    with pytest.raises(UnsupportedError, match=rf"layer: .* {k} of 768 inputs, .*; use {instead} tensor-parallel ranks"):
        method.create_weights(torch.nn.Module(), k, [64], 768, 64, torch.bfloat16, weight_loader=None)


@pytest.mark.parametrize(("group_size", "k"), [(128, 384), (128, 768), (-1, 96), (32, 96)])
def test_ranks_that_share_neither_are_not(replica: Replica, group_size: int, k: int) -> None:
    of_group_size(replica, group_size)._check_partition(768, k)


def of_group_size(replica: Replica, group_size: int) -> linear.MatGPTQLinearMethod:
    """The method of a layer of 64 outputs and 768 inputs."""
    spec = dataclasses.replace(replica.reader.spec, group_size=group_size)
    reader = SimpleNamespace(spec=spec, layers={"layer": (64, 768)}, layout=replica.reader.layout)
    return linear.MatGPTQLinearMethod(SimpleNamespace(reader=reader, num_planes=1), ["layer"])
