import pytest
import torch

from matgptq_vllm.core.errors import InputError
from matgptq_vllm.kernels.bench.competitors import (
    ALL,
    bytes_of_codes_and_scales,
    choose,
    random_scales,
    reference_product,
    relative_error,
)
from matgptq_vllm.kernels.bench.shapes import GemmShape


def keys(*arguments) -> list[str]:
    return [competitor.key for competitor in choose(*arguments)]


def test_keys_and_labels_are_unique_and_fit_a_comma_separated_option():
    assert len({c.key for c in ALL}) == len({c.label for c in ALL}) == len(ALL)
    assert not any("," in competitor.key for competitor in ALL)


def test_who_competes():
    assert keys(False, (2, 3, 4, 6, 8), False, ()) == ["width-8", "width-6", "width-4", "width-3", "width-2", "mixed-4-8"]
    assert keys(True, (4,), True, ()) == ["bf16", "marlin-w4", "machete-w4", "marlin-w8", "machete-w8", "width-4", "alone-4"]
    assert keys(False, (2, 8), False, ()) == ["width-8", "width-2"]
    assert keys(False, (2,), False, ("alone-8", "bf16")) == ["bf16", "alone-8"]


def test_a_name_that_is_no_competitor_is_refused_with_those_that_are():
    with pytest.raises(InputError, match=r"'width-5'.*width-4"):
        choose(False, (4,), False, ("width-4", "width-5"))


def test_bytes_are_codes_and_bfloat16_scales():
    shape = GemmShape("o", 64, 256)
    assert bytes_of_codes_and_scales(shape, 3, 128) == 64 * 256 * 3 // 8 + 64 * 2 * 2
    assert bytes_of_codes_and_scales(shape, 8, -1) == 64 * 256 + 64 * 2


def test_scales_are_positive_one_per_group():
    scales = random_scales(GemmShape("o", 7, 300), 128, 8, torch.device("cpu"))
    assert (scales.shape, scales.dtype) == ((7, 3), torch.bfloat16)
    assert bool((scales > 0).all())


def test_the_reference_is_the_whole_product_strip_by_strip(monkeypatch):
    monkeypatch.setattr("matgptq_vllm.kernels.bench.competitors.REFERENCE_ROWS", 5)
    x, weights = torch.randn(3, 16), torch.randn(13, 16)
    torch.testing.assert_close(reference_product(x, 13, lambda rows: weights[rows]), x @ weights.T)


def test_an_error_is_relative_and_an_unwritten_element_passes_for_none():
    reference = torch.randn(4, 8)
    assert relative_error(1.01 * reference, reference) == pytest.approx(0.01, rel=1e-3)
    assert not relative_error(torch.full_like(reference, float("nan")), reference) < 1e9
