"""kernels.wide_config: the configurations are possible, and K is split where programs would be missing."""

import pytest
import torch

from matgptq_vllm.kernels.layout import UNIT_K, padded
from matgptq_vllm.kernels.wide_config import MAX_SPLIT, REGISTERS, wide_config, wide_runs


@pytest.mark.parametrize(("n", "k"), [(64, 128), (130, 896), (896, 4864), (4096, 14336), (6144, 4096), (28672, 4096)])
@pytest.mark.parametrize("bucket", [32, 64, 128, 256, 512])
@pytest.mark.parametrize("num_sms", [78, 132])
def test_every_program_has_units_of_k_and_rows_for_its_tiles(bucket: int, n: int, k: int, num_sms: int) -> None:
    config = wide_config(bucket, n, k, num_sms)
    assert 1 <= config.split_k <= min(MAX_SPLIT, padded(k, UNIT_K) // UNIT_K)
    assert (config.block_m, config.block_n) in ((32, 256), (64, 256), (128, 256), (256, 128))
    # Stages of words at 8 bits and of x, and some kilobytes for barriers and for what is written.
    assert (config.stages * config.block_n + config.halves * config.block_m) * UNIT_K + (3 << 10) <= 227 << 10
    # Sums, weights in flight and next ones of a thread, 32-bit, beside some thirty other registers.
    assert config.block_m * config.tiles // 2 + 48 + 30 <= REGISTERS[0]


def test_k_is_split_until_all_multiprocessors_work_but_not_further() -> None:
    assert wide_config(64, 4096, 14336, 132).split_k == 8
    assert wide_config(128, 28672, 4096, 132).split_k == 1
    assert wide_config(32, 64, 128, 132).split_k == 1


def test_it_runs_on_no_cpu() -> None:
    assert not wide_runs(torch.device("cpu"))
