import pytest
import torch

from calibrate.hessian import HessianAccumulator, damped, inverse_factor


def correlated(tokens: int, k: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(4)
    return torch.randn(tokens, k, generator=generator) @ torch.randn(k, k, generator=generator)


def test_accumulator_is_the_mean_outer_product_over_ragged_batches():
    inputs = correlated(105, 7)
    accumulator = HessianAccumulator(7)
    accumulator.add(inputs[:60].view(3, 20, 7))
    accumulator.add(inputs[60:].bfloat16().float())
    rounded = torch.cat([inputs[:60], inputs[60:].bfloat16().float()]).double()
    torch.testing.assert_close(accumulator.mean().double(), rounded.t() @ rounded / 105, rtol=1e-5, atol=1e-5)


def test_damping_adds_a_share_of_the_mean_diagonal_and_leaves_its_argument():
    hessian = torch.diag(torch.tensor([1.0, 3.0]))
    assert torch.equal(damped(hessian, 0.5), torch.diag(torch.tensor([2.0, 4.0])))
    assert torch.equal(hessian, torch.diag(torch.tensor([1.0, 3.0])))


def test_inputs_that_were_always_zero_get_the_identity():
    assert torch.equal(damped(torch.zeros(3, 3), 0.01), torch.eye(3))
    assert torch.equal(inverse_factor(torch.zeros(3, 3), 0.01, "layer"), torch.eye(3))


def test_factor_is_upper_triangular_and_squares_to_the_inverse(recwarn):
    inputs = correlated(400, 19)
    hessian = inputs.t() @ inputs / 400
    factor = inverse_factor(hessian, 0.01, "layer").double()
    assert torch.equal(factor, factor.triu())
    torch.testing.assert_close(factor.t() @ factor, torch.linalg.inv(damped(hessian, 0.01).double()), rtol=1e-4, atol=1e-5)
    assert not recwarn.list


def test_more_damping_rescues_an_indefinite_hessian_with_a_warning():
    hessian = torch.diag(torch.tensor([1.0, 1.0, 1.0, -0.05]))
    with pytest.warns(UserWarning, match=r"block\.q_proj: .*not positive definite with damping 0\.01; trying 0\.1"):
        factor = inverse_factor(hessian, 0.01, "block.q_proj")
    torch.testing.assert_close(factor.t() @ factor, torch.linalg.inv(damped(hessian, 0.1)))


@pytest.mark.filterwarnings("ignore:.*not positive definite")
def test_a_hopeless_hessian_means_rounding_to_nearest():
    hessian = torch.diag(torch.tensor([1.0, -1e12, 1.0, 1e12]))
    with pytest.warns(UserWarning, match="rounded to nearest"):
        factor = inverse_factor(hessian, 0.01, "layer")
    assert torch.equal(factor, torch.eye(4))
