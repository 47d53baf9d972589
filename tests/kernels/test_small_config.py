"""kernels.small_config: every configuration fits the layer, and a range of M has one."""

import pytest
import torch

from matgptq_vllm.kernels.layout import PAD_N, UNIT_K, UNIT_N, padded
from matgptq_vllm.kernels.small_config import PROGRAMS, ROW_ROOMS, SMALL_TO, UNITS, small_config, small_runs

SHAPES = [
    (6144, 4096),
    (4096, 4096),
    (28672, 4096),
    (4096, 14336),
    (64, 128),
    (130, 648),
    (9728, 896),
    (896, 4864),
    (512, 13696),
]


@pytest.mark.parametrize(("n", "k"), SHAPES)
def test_a_configuration_fits_the_layer(n: int, k: int) -> None:
    num_tiles, units = padded(n, PAD_N) // UNIT_N, padded(k, UNIT_K) // UNIT_K
    for m in range(1, SMALL_TO + 1):
        config = small_config(m, n, k, 132)
        assert config.rows >= m
        assert config.num_warps == 8
        assert num_tiles % config.tiles == 0
        assert 1 <= config.split_k <= units
        assert 1 <= config.programs <= num_tiles // config.tiles
        assert -(-units // config.split_k) <= UNITS[config.rows]


@pytest.mark.parametrize(("n", "k"), [*SHAPES, (57344, 8192), (8192, 28672)])
def test_all_programs_run_at_once(n: int, k: int) -> None:
    for m in ROW_ROOMS:
        config = small_config(m, n, k, 132)
        assert config.programs * config.split_k <= PROGRAMS * 132


def test_rows_of_a_range_have_one_configuration() -> None:
    ranges = zip((0, *ROW_ROOMS), ROW_ROOMS, strict=False)
    found = [{small_config(m, 4096, 4096, 132) for m in range(low + 1, high + 1)} for low, high in ranges]
    assert all(len(configs) == 1 for configs in found)
    assert len(set.union(*found)) == len(ROW_ROOMS)


def test_warps_read_ahead_whole_steps_where_they_can() -> None:
    assert small_config(1, 28672, 4096, 132).depths == (4, 4, 4, 2, 2)
    # 14 units per warp, and a single one.
    assert small_config(1, 4096, 14336, 132).depths == (2, 2, 2, 2, 2)
    assert small_config(16, 512, 256, 132).depths == (1, 1, 1, 1, 1)


def test_it_runs_few_rows_on_hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("matgptq_vllm.kernels.small_config.wide_runs", lambda device: True)
    assert [m for m in range(1, 20) if small_runs(torch.device("cuda"), m)] == list(range(1, 17))


def test_it_does_not_run_without_a_gpu() -> None:
    assert not small_runs(torch.device("cpu"), 1)
