"""kernels.wide_config: the configurations are possible, and K is split where programs would be missing."""

import pytest
import torch

from matgptq_vllm.kernels.layout import UNIT_K, padded
from matgptq_vllm.kernels.wide_config import MAX_SPLIT, REGISTERS, wide_config, wide_runs


@pytest.mark.parametrize(("n", "k"), [(64, 128), (130, 896), (896, 4864), (4096, 14336), (6144, 4096), (28672, 4096)])
@pytest.mark.parametrize("bucket", [32, 64, 128, 256, 512])
@pytest.mark.parametrize("num_sms", [78, 132])
def test_every_program_has_units_of_k_and_rows_for_its_tiles(bucket: int, n: int, k: int, num_sms: int) -> None:
    config = wide_config(bucket, n, k, num_sms, False)
    assert 1 <= config.split_k <= min(MAX_SPLIT, padded(k, UNIT_K) // UNIT_K)
    assert config.block_m in (32, 64, 128, 256)
    assert config.block_n in ((128, 256) if config.block_m < 256 else (128,))
    # Stages of words at 8 bits and of x, and some kilobytes for barriers and for what is written.
    assert (config.stages * config.block_n + config.halves * config.block_m) * UNIT_K + (3 << 10) <= 227 << 10
    # Sums, weights in flight and next ones of a thread, 32-bit, beside some thirty other registers.
    assert config.block_m * config.tiles // 2 + 48 + 30 <= REGISTERS[0]


def test_k_is_split_until_all_multiprocessors_work_but_not_further() -> None:
    # Tiles of 128 outputs, 32 of them.
    assert wide_config(64, 4096, 14336, 132, False).split_k == 4
    assert wide_config(128, 28672, 4096, 132, False).split_k == 1
    assert wide_config(32, 64, 128, 132, False).split_k == 1


@pytest.mark.parametrize(("n", "k"), [(34816, 5120), (51200, 5120), (57344, 8192)])
@pytest.mark.parametrize("bucket", [32, 128, 256])
def test_programs_have_equal_shares_where_a_last_round_would_leave_most_of_them_idle(bucket: int, n: int, k: int) -> None:
    config = wide_config(bucket, n, k, 132, True)
    assert (config.programs, config.split_k) == (132, 1)
    # With rows of several widths, nobody knows before how many row tiles there are.
    assert wide_config(bucket, n, k, 132, False).programs == 0


@pytest.mark.parametrize(("n", "k"), [(6144, 4096), (4096, 14336), (28672, 4096)])
@pytest.mark.parametrize("bucket", [32, 128, 256])
def test_programs_have_tiles_of_their_own_where_there_are_few_or_rounds_are_full(bucket: int, n: int, k: int) -> None:
    assert wide_config(bucket, n, k, 132, True) == wide_config(bucket, n, k, 132, False)


def test_it_runs_on_no_cpu() -> None:
    assert not wide_runs(torch.device("cpu"))
