"""kernels.wide_config: the configurations are possible, and the more rows the fewer shares of K."""

import pytest
import torch

from matgptq_vllm.kernels.layout import PAD_N, padded
from matgptq_vllm.kernels.wide_config import WideConfig, wide_config, wide_runs


@pytest.mark.parametrize("n", [64, 130, 896, 4096, 6144, 28672])
@pytest.mark.parametrize("bucket", [64, 128, 256, 512])
@pytest.mark.parametrize("num_sms", [78, 132])
def test_tiles_cover_the_padded_outputs_and_split_is_a_small_power_of_two(bucket: int, n: int, num_sms: int) -> None:
    config = wide_config(bucket, n, num_sms)
    assert padded(n, PAD_N) % (16 * config.num_warps) == 0
    assert config.block_m in (32, 64, 128)
    assert config.split_k in (1, 2, 4, 8)


def test_k_is_split_only_as_far_as_programs_are_wanted() -> None:
    assert wide_config(64, 4096, 132) == WideConfig(64, 4)
    assert wide_config(128, 28672, 132) == WideConfig(128, 1, num_warps=8)
    assert wide_config(256, 28672, 132).split_k == 1


def test_it_runs_on_no_cpu() -> None:
    assert not wide_runs(torch.device("cpu"))
