"""plugin.elastic_layer: planes read again are those that were loaded, in both layouts; tables keep their addresses."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from vllm.model_executor import parameter as vllm_parameter

from matgptq_vllm.core.checkpoint import plane_name
from matgptq_vllm.core.replica import ReplicaOptions
from matgptq_vllm.engine.replica import Replica
from matgptq_vllm.plugin import linear

MEMBERS = [f"model.layers.0.mlp.{name}_proj" for name in ("gate", "up")]


@pytest.fixture(params=[torch.uint8, torch.int32], ids=["checkpoint-layout", "kernel-layout"])
def loaded(request, profiled_parent: Path, monkeypatch) -> tuple[Replica, torch.nn.Module]:
    """The fused layer of MEMBERS of an elastic replica, loaded as vLLM does it."""
    kernels = request.param == torch.int32
    scheduler_config = SimpleNamespace(max_num_batched_tokens=16)
    monkeypatch.setattr(linear, "get_current_vllm_config", lambda: SimpleNamespace(scheduler_config=scheduler_config))
    monkeypatch.setattr(linear, "kernels_run", lambda *_: kernels)
    monkeypatch.setattr(vllm_parameter, "get_tensor_model_parallel_rank", lambda: 0)
    monkeypatch.setattr(vllm_parameter, "get_tensor_model_parallel_world_size", lambda: 1)
    replica = Replica(profiled_parent, ReplicaOptions(), kernel_layout=kernels)
    replica.make_elastic(torch.device("cpu"))
    method, layer = linear.MatGPTQLinearMethod(replica, MEMBERS), torch.nn.Module()
    n, k = replica.reader.layers[MEMBERS[0]]

    def weight_loader(parameter: torch.Tensor, weight: torch.Tensor, shard: int) -> None:
        parameter.data[shard * n : (shard + 1) * n] = weight

    method.create_weights(layer, k, [n, n], k, 2 * n, torch.bfloat16, weight_loader=weight_loader)
    for name, tensor in replica.reader.tensors():
        for shard, member in enumerate(MEMBERS):
            if name.startswith(f"{member}."):
                weight_loader(layer.get_parameter(name.rpartition(".")[2]), tensor, shard)
    method.process_weights_after_loading(layer)
    return replica, layer


def test_planes_come_back_as_they_were(loaded: tuple[Replica, torch.nn.Module]) -> None:
    replica, layer = loaded
    elastic = replica.elastic
    assert elastic is not None
    planes = [layer.get_parameter(plane_name(plane)) for plane in range(5)]
    wanted, addresses = [plane.clone() for plane in planes], [plane.data_ptr() for plane in planes]
    for narrow, wide in ((2, 3), (2, 8), (4, 8), (6, 8), (3, 6), (2, 8)):
        if narrow < elastic.max_width:
            elastic.shrink(narrow)
            assert all((planes[plane] == 0).all() for plane in range(elastic.num_planes(narrow), 5))
        elastic.grow(wide)
        elastic._growing[1].result(60)
        elastic.finish()
        for plane in range(elastic.num_planes(wide)):
            assert torch.equal(planes[plane], wanted[plane])
    assert [plane.data_ptr() for plane in planes] == addresses
    assert wanted[4].any()


def test_no_row_is_read_wider_than_the_limit(loaded: tuple[Replica, torch.nn.Module]) -> None:
    replica, layer = loaded
    elastic = replica.elastic
    tables = [layer.profile_widths, layer.host_profile_widths]
    wanted, addresses = [table.clone() for table in tables], [table.data_ptr() for table in tables]
    elastic.shrink(3)
    for table, before in zip(tables, wanted, strict=True):
        assert int(table.max()) == 3
        assert torch.equal(table, before.clamp(max=3))
    elastic.grow(8)
    elastic._growing[1].result(60)
    elastic.finish()
    assert all(torch.equal(table, before) for table, before in zip(tables, wanted, strict=True))
    assert [table.data_ptr() for table in tables] == addresses
