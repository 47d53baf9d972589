"""calibrate.factoring: the factor of the inverse Hessian, and what happens when there is none."""

import warnings

import pytest
import torch

from calibrate.factoring import DAMP_GROWTH, MAX_ATTEMPTS, factored


def hessian_of(k: int, num_tokens: int) -> torch.Tensor:
    """Mean of x x^T over random tokens with a common part, float32 [K, K]; of rank ``num_tokens`` at most."""
    generator = torch.Generator().manual_seed(k)
    inputs = torch.randn(num_tokens, k, generator=generator) + torch.randn(num_tokens, 1, generator=generator)
    return inputs.t() @ inputs / num_tokens


@pytest.mark.parametrize("k", [1, 2, 7, 33, 130])
@pytest.mark.parametrize("damp", [0.01, 0.1])
def test_the_factor_is_upper_and_its_square_is_the_inverse_of_the_damped_hessian(k: int, damp: float) -> None:
    hessian = hessian_of(k, 4 * k)
    before = hessian.clone()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = factored(hessian, damp, "layer")
    assert found.damped is hessian
    torch.testing.assert_close(found.damped, before + damp * before.diagonal().mean() * torch.eye(k))
    assert found.factor.dtype == torch.float32
    assert torch.equal(found.factor, found.factor.triu())
    assert (found.factor.diagonal() > 0).all()
    factor = found.factor.double()
    torch.testing.assert_close(factor.t() @ factor @ found.damped.double(), torch.eye(k).double(), rtol=0.0, atol=1e-4)


def test_fewer_tokens_than_inputs_are_no_reason_to_warn() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = factored(hessian_of(40, 8), 0.01, "layer")
    factor = found.factor.double()
    torch.testing.assert_close(factor.t() @ factor @ found.damped.double(), torch.eye(40).double(), rtol=0.0, atol=1e-3)


def test_inputs_never_seen_get_the_damping_alone_and_touch_no_other() -> None:
    hessian, dead = hessian_of(20, 80), [3, 11]
    hessian[dead] = 0
    hessian[:, dead] = 0
    added = 0.01 * hessian.diagonal().mean()
    found = factored(hessian, 0.01, "layer")
    for index in dead:
        off = torch.arange(20) != index
        assert found.factor[index, off].eq(0).all()
        assert found.factor[off, index].eq(0).all()
        assert found.factor[index, index].item() == pytest.approx(float(added) ** -0.5, rel=1e-5)


def test_without_any_token_the_hessian_is_the_identity() -> None:
    found = factored(torch.zeros(5, 5), 0.01, "layer")
    torch.testing.assert_close(found.damped, torch.eye(5))
    torch.testing.assert_close(found.factor, torch.eye(5))


def test_damping_grows_tenfold_with_a_warning_each_time_until_it_is_enough() -> None:
    # Eigenvalues 1 and -0.5, mean diagonal 1: the first damping above 0.5 is 0.01 * 10^2.
    hessian = torch.diag(torch.tensor([2.5, -0.5]))
    with pytest.warns(UserWarning, match="not positive definite") as caught:
        found = factored(hessian, 0.01, "h.3.q_proj")
    stated = [str(warning.message) for warning in caught]
    assert [message.split("damping ")[1].split(";")[0] for message in stated] == ["0.01", "0.1"]
    assert [message.split("trying ")[1].split(". ")[0] for message in stated] == ["0.1", "1"]
    assert all(message.startswith("h.3.q_proj: ") and "--damp" in message for message in stated)
    torch.testing.assert_close(found.damped, torch.diag(torch.tensor([3.5, 0.5])))
    torch.testing.assert_close(found.factor, torch.diag(torch.tensor([3.5, 0.5]) ** -0.5))


@pytest.mark.parametrize(
    "hessian",
    [
        torch.full((3, 3), torch.nan),
        torch.diag(torch.tensor([1.0, torch.nan, 1.0])),
        torch.diag(torch.tensor([1.0, torch.inf, 1.0])),
        torch.diag(torch.tensor([1.0, 1.0, -1e9])),
    ],
    ids=["all nan", "one nan", "infinite", "indefinite"],
)
def test_a_hessian_that_cannot_be_factored_gives_way_to_the_identity(hessian: torch.Tensor) -> None:
    with pytest.warns(UserWarning, match=r"^h\.0\.up_proj: its Hessian") as caught:
        found = factored(hessian, 0.01, "h.0.up_proj")
    assert len(caught) == MAX_ATTEMPTS + 1
    assert "rounded to nearest" in str(caught[-1].message)
    assert f"trying {0.01 * DAMP_GROWTH**MAX_ATTEMPTS:g}" in str(caught[-2].message)
    assert torch.equal(found.factor, torch.eye(3))
    assert torch.equal(found.damped, torch.eye(3))
