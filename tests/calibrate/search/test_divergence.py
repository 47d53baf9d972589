import pytest
import torch

from calibrate.search.divergence import log_probabilities, mean_divergence, windows_per_batch


def exact(target, logits):
    log_p, log_q = target.double().log_softmax(-1), logits.double().log_softmax(-1)
    return (log_p.exp() * (log_p - log_q)).sum(-1).mean().item()


@pytest.mark.parametrize("positions", [1, 7, 256, 300, 515])
@pytest.mark.parametrize("noise", [0.01, 0.3, 2.0])
def test_divergence_is_that_of_the_definition_in_spite_of_float16(positions, noise):
    generator = torch.Generator().manual_seed(positions)
    target = torch.randn(positions, 203, generator=generator) * 4
    logits = target + noise * torch.randn(positions, 203, generator=generator)
    measured = mean_divergence(log_probabilities(target), logits).item()
    assert measured == pytest.approx(exact(target, logits), rel=0.01, abs=1e-6)


def test_equal_distributions_differ_by_nothing_that_matters():
    target = torch.randn(300, 203, generator=torch.Generator().manual_seed(0)) * 4
    assert abs(mean_divergence(log_probabilities(target), target + 3.0).item()) < 1e-6


def test_log_probabilities_keep_any_shape_and_type():
    logits = torch.randn(2, 130, 11, dtype=torch.bfloat16)
    result = log_probabilities(logits)
    assert (result.shape, result.dtype) == (logits.shape, torch.float16)
    assert torch.allclose(result.float(), logits.float().log_softmax(-1), atol=5e-3)


def test_at_least_one_window_makes_a_batch():
    assert windows_per_batch(8192, 256) == 8
    assert windows_per_batch(200_000, 2048) == 1
