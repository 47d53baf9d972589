from dataclasses import replace

import pytest

from matgptq_vllm.core.precision import WIDTHS
from matgptq_vllm.kernels.config import MAX_SPLIT_ROWS
from matgptq_vllm.kernels.tune.candidates import first_round, second_round
from matgptq_vllm.kernels.tuning import Hardware, Problem, default, fitted, shared_bytes

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
    known = replace(default(problem, hardware), num_stages=2)
    first = first_round(problem, hardware, known)
    second = second_round(problem, hardware, first[:2])
    assert first[0] == known
    assert default(problem, hardware) in first
    for candidates in (first, second):
        assert 1 <= len(candidates) <= 60
        assert len(set(candidates)) == len(candidates)
        for config in candidates:
            assert fitted(config, problem, hardware) == config
            assert shared_bytes(config, problem) <= hardware.shared_bytes
            assert config.split_k == 1 or bucket <= MAX_SPLIT_ROWS


def test_k_is_split_in_several_ways_where_tiles_are_few_and_not_where_there_are_many():
    few, many = Problem(16, 4096, 14336, (4,), 128), Problem(16, 57344, 8192, (4,), 128)
    assert len({config.split_k for config in first_round(few, H200, default(few, H200))}) >= 4
    assert {config.split_k for config in first_round(many, H200, default(many, H200))} <= {1, 2}


def test_overlap_is_tried_only_where_the_gpu_has_it():
    problem = Problem(16, 4096, 4096, (4,), 128)
    for hardware, tried in ((H200, True), (A10, False)):
        base = default(problem, hardware)
        assert any(config.pdl for config in second_round(problem, hardware, [base])) == tried
