import pytest
import torch

from calibrate.ranks import Ranks
from calibrate.statistics import StatisticsAccumulator

CPU = torch.device("cpu")
ALONE = Ranks(0, 1, CPU)


def correlated(tokens: int, k: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(4)
    return torch.randn(tokens, k, generator=generator) @ torch.randn(k, k, generator=generator)


@pytest.mark.parametrize("k", [1, 7, 129, 300, 513])
def test_statistics_are_means_over_the_tokens_of_ragged_batches(k):
    inputs, original = correlated(105, k), correlated(105, k).roll(1, 0)
    accumulator = StatisticsAccumulator(k, CPU, with_cross=True)
    accumulator.add(inputs[:60].view(3, 20, k), original[:60].view(3, 20, k))
    accumulator.add(inputs[60:].bfloat16(), original[60:])
    seen = torch.cat([inputs[:60], inputs[60:].bfloat16().float()]).double()
    found = accumulator.finish(ALONE)
    assert found.num_tokens == 105
    torch.testing.assert_close(found.hessian.double(), seen.t() @ seen / 105, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(found.cross.double(), seen.t() @ original.double() / 105, rtol=1e-3, atol=1e-3)


def test_layers_that_saw_no_token_have_zero_statistics():
    accumulator = StatisticsAccumulator(5, CPU)
    accumulator.add(torch.empty(0, 5))
    found = accumulator.finish(ALONE)
    assert (found.num_tokens, found.cross) == (0, None)
    assert torch.equal(found.hessian, torch.zeros(5, 5))
