import pytest

from matgptq_vllm.kernels.bench.competitors import ALONE, MIXED, UNIFORM
from matgptq_vllm.kernels.bench.ratios import ratio

PEERS = {"bf16": 100.0, "marlin-w4": 70.0, "machete-w4": 80.0, "marlin-w8": 95.0, "machete-w8": 90.0}

TARGETS = [
    # competitor, M, our time, value, compared with, is it met; each pair lies on either side of the target
    (UNIFORM[8], 1, 75.0, 90 / 75, "Machete W8", True),
    (UNIFORM[8], 16, 75.1, 90 / 75.1, "Machete W8", False),
    (UNIFORM[8], 32, 89.9, 90 / 89.9, "Machete W8", True),
    (UNIFORM[8], 64, 90.1, 90 / 90.1, "Machete W8", False),
    (UNIFORM[8], 128, 94.4, 94.4 / 90, "Machete W8", True),
    (UNIFORM[8], 256, 94.6, 94.6 / 90, "Machete W8", False),
    (UNIFORM[8], 2048, 109.0, 1.09, "cuBLAS bf16", True),
    (UNIFORM[8], 2048, 111.0, 1.11, "cuBLAS bf16", False),
    (UNIFORM[4], 16, 49.9, 70 / 49.9, "Marlin W4", True),
    (UNIFORM[4], 1, 50.1, 70 / 50.1, "Marlin W4", False),
    (UNIFORM[4], 64, 63.6, 70 / 63.6, "Marlin W4", True),
    (UNIFORM[4], 32, 63.7, 70 / 63.7, "Marlin W4", False),
    (UNIFORM[4], 128, 73.4, 73.4 / 70, "Marlin W4", True),
    (UNIFORM[4], 2048, 109.9, 1.099, "cuBLAS bf16", True),
    (UNIFORM[3], 4, 43.7, 70 / 43.7, "Marlin W4", True),
    (UNIFORM[3], 4, 43.8, 70 / 43.8, "Marlin W4", False),
    (UNIFORM[3], 64, 58.3, 70 / 58.3, "Marlin W4", True),
    (UNIFORM[2], 16, 36.8, 70 / 36.8, "Marlin W4", True),
    (UNIFORM[2], 16, 36.9, 70 / 36.9, "Marlin W4", False),
    (UNIFORM[2], 32, 58.4, 70 / 58.4, "Marlin W4", False),
    (UNIFORM[2], 512, 60.0, 60 / 70, "Marlin W4", None),
    (UNIFORM[6], 1, 60.0, 1.5, "Machete W8", None),
]


@pytest.mark.parametrize(("competitor", "m", "ours", "value", "against", "met"), TARGETS)
def test_ratios_and_targets_of_uniform_widths(competitor, m, ours, value, against, met):
    found = ratio(competitor, m, {(competitor.key, m): ours, **{(key, m): us for key, us in PEERS.items()}})
    assert found is not None
    assert (found.value, found.against, found.is_met) == (pytest.approx(value), against, met)


@pytest.mark.parametrize(("m", "limit"), [(4, 1.15), (64, 1.15), (128, 1.35), (256, 1.35), (2048, 1.25)])
def test_a_mixed_batch_is_compared_with_width_8(m: int, limit: float):
    for factor, met in ((0.999, True), (1.001, False)):
        found = ratio(MIXED, m, {("mixed-4-8", m): limit * factor * 80.0, ("width-8", m): 80.0, ("bf16", m): 1.0})
        assert found is not None
        assert (found.value, found.is_speedup, found.is_met) == (pytest.approx(limit * factor), False, met)


def test_bf16_counts_as_a_rival_from_128_rows():
    times = {("width-4", m): 50.0 for m in (64, 128)} | {("bf16", m): 40.0 for m in (64, 128)}
    times |= {("machete-w4", m): 60.0 for m in (64, 128)}
    assert [ratio(UNIFORM[4], m, times).against for m in (64, 128)] == ["Machete W4", "cuBLAS bf16"]  # type: ignore[union-attr]


def test_without_ours_or_without_any_rival_there_is_no_ratio():
    assert ratio(UNIFORM[4], 1, {("marlin-w4", 1): 70.0}) is None
    assert ratio(UNIFORM[4], 1, {("width-4", 1): 50.0, ("marlin-w8", 1): 90.0, ("bf16", 1): 1.0}) is None
    assert ratio(UNIFORM[4], 1, {("width-4", 1): 50.0, ("marlin-w4", 1): 70.0}) is not None


def test_a_replica_of_one_width_has_no_target_of_its_own():
    found = ratio(ALONE[4], 1, {("alone-4", 1): 35.0, ("marlin-w4", 1): 70.0})
    assert found is not None
    assert (found.value, found.target) == (2.0, None)
