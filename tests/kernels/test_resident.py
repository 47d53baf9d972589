"""kernels.resident: where the kernels run, and what a layer holds for them."""

import pytest
import torch

from matgptq_vllm.core.errors import UnsupportedError
from matgptq_vllm.core.planes import PlaneLayout
from matgptq_vllm.kernels.gemm import num_locks
from matgptq_vllm.kernels.layout import to_kernel_layout
from matgptq_vllm.kernels.resident import kernels_run, to_resident

GPU = torch.device("cuda", 0)


@pytest.fixture
def capability(monkeypatch):
    def of(*found: int) -> None:
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: found)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")

    return of


@pytest.mark.parametrize("found", [(8, 0), (8, 9), (9, 0), (12, 0)])
def test_the_kernels_run_in_half_precision_on_gpus_from_ampere_on(capability, found) -> None:
    capability(*found)
    assert kernels_run(GPU, torch.bfloat16)
    assert kernels_run(GPU, torch.float16)
    assert not kernels_run(GPU, torch.float32)


def test_the_cpu_keeps_the_checkpoint_layout() -> None:
    assert not kernels_run(torch.device("cpu"), torch.bfloat16)


def test_an_older_gpu_is_refused_by_name(capability) -> None:
    capability(7, 5)
    with pytest.raises(UnsupportedError, match=r"Tesla T4 has compute capability 7\.5; matgptq-vllm needs 8\.0 or more"):
        kernels_run(GPU, torch.float16)


@pytest.mark.parametrize(("num_planes", "held"), [(5, 5), (3, 3), (1, 1)])
def test_a_layer_holds_its_planes_in_the_kernel_layout_and_locks_at_zero(num_planes: int, held: int) -> None:
    layout = PlaneLayout()
    codes = torch.randint(0, 256, (200, 96), dtype=torch.uint8)
    planes, scales = layout.split(codes)[:num_planes], torch.rand(200, 3).bfloat16()
    resident = to_resident(planes, scales, layout, 96, 32)
    wanted, wanted_scales = to_kernel_layout(planes, scales, layout, 96, 32)
    assert len(resident.planes) == held
    for found, plane in zip([*resident.planes, resident.scales], [*wanted, wanted_scales], strict=True):
        assert torch.equal(found, plane)
    assert (resident.locks.dtype, resident.locks.shape) == (torch.int32, (num_locks(200),))
    assert not resident.locks.any()
