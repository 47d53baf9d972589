"""kernels.small_config: every configuration fits the layer, and a range of M has one."""

import pytest

from matgptq_vllm.kernels.layout import PAD_N, UNIT_K, UNIT_N, padded
from matgptq_vllm.kernels.small_config import PROGRAMS, ROW_ROOMS, SMALL_TO, UNITS, prefers_small, small_config

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
    for m in range(1, ROW_ROOMS[-1] + 1):
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


def test_programs_take_turns_where_more_of_them_than_run_at_once_would_not_be_idle() -> None:
    # 48 groups of tiles: 4 parts of K leave 72 of 264 programs idle, 16 in 3 turns 8.
    assert (small_config(8, 6144, 4096, 132).split_k, small_config(8, 6144, 4096, 132).programs) == (16, 16)
    # Not worth adding sums up, for so few rows.
    assert (small_config(4, 28672, 4096, 132).split_k, small_config(4, 28672, 4096, 132).programs) == (1, 224)


def test_it_is_preferred_for_few_rows_and_for_somewhat_more_where_there_is_little_to_do() -> None:
    def rows(n: int, k: int, *widths: int) -> list[int]:
        return [m for m in (1, 16, 17, 32, 33) if prefers_small(m, n, k, widths, "curved", 132)]

    assert rows(4096, 4096, 4) == rows(6144, 4096, 8) == [1, 16, 17, 32]
    assert rows(28672, 4096, 4) == rows(4096, 14336, 4) == [1, 16]
    assert rows(4096, 4096, 2, 4) == rows(4096, 4096, 3) == [1, 16]
    assert SMALL_TO == 16
