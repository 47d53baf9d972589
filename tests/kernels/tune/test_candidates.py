from dataclasses import asdict, replace

import pytest

from matgptq_vllm.core.precision import WIDTHS
from matgptq_vllm.kernels.config import MAX_SPLIT_ROWS
from matgptq_vllm.kernels.tune.candidates import first_round, second_round
from matgptq_vllm.kernels.tuning import Hardware, Problem, default, fitted

H200 = Hardware("NVIDIA H200", 132, 227 << 10, (9, 0))
A10 = Hardware("NVIDIA A10", 72, 99 << 10, (8, 6))


@pytest.mark.parametrize("hardware", [H200, A10], ids=lambda hardware: hardware.name)
@pytest.mark.parametrize(("n", "k"), [(4096, 4096), (28672, 4096), (130, 520)])
@pytest.mark.parametrize("bucket", [8, 64, 256, 512, 2048])
@pytest.mark.parametrize("widths", [WIDTHS, (2,)])
def test_every_candidate_keeps_to_the_limits_and_there_are_not_many(
    hardware: Hardware, n: int, k: int, bucket: int, widths: tuple[int, ...]
):
    problem = Problem(bucket, n, k, widths, 128)
    known = replace(default(problem, hardware), max_registers=120)
    first = first_round(problem, hardware, known)
    second = second_round(problem, hardware, first[:2])
    assert first[0] == known
    assert default(problem, hardware) in first
    assert len(first) + len(second) <= 32
    for candidates in (first, second):
        assert len(set(candidates)) == len(candidates)
        for config in candidates:
            assert fitted(config, problem, hardware) == config
            assert config.split_k == 1 or bucket <= MAX_SPLIT_ROWS


def test_k_is_split_in_several_ways_where_tiles_are_few_and_not_where_there_are_many():
    few, many = Problem(16, 4096, 14336, (4,), 128), Problem(16, 57344, 8192, (4,), 128)
    assert {config.split_k for config in first_round(few, H200, default(few, H200))} == {1, 2, 4}
    assert {config.split_k for config in first_round(many, H200, default(many, H200))} == {1}


def test_wide_tiles_are_tried_for_many_rows_only_and_the_most_warps_for_few_tiles():
    def tried(field: str, bucket: int, n: int) -> set[int]:
        problem = Problem(bucket, n, 14336, (4,), 128)
        return {getattr(config, field) for config in first_round(problem, H200, default(problem, H200))}

    assert tried("block_n", 16, 4096) == {16, 32}
    assert tried("block_n", 32, 4096) == tried("block_n", 512, 4096) == {16, 32, 64}
    assert 16 in tried("num_warps", 8, 896)
    assert tried("num_warps", 8, 28672) == {2, 4, 8}


def test_of_a_small_layer_the_configurations_with_the_most_warps_are_measured():
    problem = Problem(8, 130, 4864, (4,), 128)
    first = first_round(problem, H200, default(problem, H200))
    at_once = [problem.tiles(config) * config.split_k * config.num_warps for config in first]
    assert len(first) > 2
    assert max(at_once) <= 4 * min(at_once)


def test_the_second_round_changes_depth_registers_or_overlap_one_at_a_time():
    problem = Problem(8, 28672, 4096, (4,), 128)
    base = default(problem, H200)
    found = second_round(problem, H200, [base])
    assert {config.depth for config in found} == {1, 2, 3}
    assert {config.max_registers for config in found} == {None, 96, 128, 168}
    assert {config.pdl for config in found} == {True, False}
    for config in found:
        assert sum(a != b for a, b in zip(asdict(config).values(), asdict(base).values(), strict=True)) <= 1


def test_overlap_is_tried_only_where_the_gpu_has_it():
    problem = Problem(16, 4096, 4096, (4,), 128)
    for hardware, tried in ((H200, {True, False}), (A10, {False})):
        assert {config.pdl for config in second_round(problem, hardware, [default(problem, hardware)])} == tried
