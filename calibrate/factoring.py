"""Damp a Hessian and factor its inverse: what the column pass needs (GPTQ, arXiv 2210.17323, section 3.3)."""

import warnings
from dataclasses import dataclass

import torch

DAMP_GROWTH = 10.0
MAX_ATTEMPTS = 5


@dataclass(frozen=True)
class Factored:
    """A Hessian ready for use."""

    damped: torch.Tensor
    """H, float32 [K, K], damped until it could be factored; the identity if that never helped."""
    factor: torch.Tensor
    """Upper Cholesky factor U of the inverse, float32 [K, K], zero below the diagonal: U^T U = H^-1."""


def factored(hessian: torch.Tensor, damp: float, name: str) -> Factored:
    """Damp and factor a Hessian. Inputs that calibration never saw get the damping alone: their weights are rounded to nearest.

    Damping is raised tenfold, with a warning, while H cannot be factored; after five attempts the identity takes its
    place, which means rounding to nearest. Without any token the Hessian is the identity too.

    Args:
        hessian: float32 [K, K]; damped in place, since that of a wide layer takes gigabytes.
        damp: share of the mean diagonal to add.
        name: the layer, for warnings.
    """
    mean = hessian.diagonal().mean()
    unit = torch.where(mean > 0, mean, 1 / damp)
    added = 0.0
    for _ in range(MAX_ATTEMPTS):
        hessian.diagonal().add_((damp - added) * unit)
        added = damp
        factor = _inverse_factor(hessian)
        if factor is not None:
            return Factored(hessian, factor)
        warnings.warn(
            f"{name}: its Hessian is not positive definite with damping {damp:g}; trying {damp * DAMP_GROWTH:g}. "
            "More calibration text, or a larger --damp, avoids this",
            stacklevel=2,
        )
        damp *= DAMP_GROWTH
    warnings.warn(f"{name}: its Hessian cannot be factored; the layer is rounded to nearest", stacklevel=2)
    identity = torch.eye(hessian.shape[0], dtype=torch.float32, device=hessian.device)
    return Factored(identity, identity)


def _inverse_factor(hessian: torch.Tensor) -> torch.Tensor | None:
    """U of ``hessian`` [K, K], computed in float64; None if it is not positive definite."""
    # H = L L^T with the columns in reverse order gives H^-1 = U^T U in one triangular inverse:
    # flipping both axes of L yields an upper triangle T with H = T T^T, and U = T^-1.
    lower, failed = torch.linalg.cholesky_ex(hessian.flip(0, 1).double())
    if failed.item() or not torch.isfinite(lower).all():
        return None
    upper = lower.flip(0, 1)
    del lower
    identity = torch.eye(hessian.shape[0], dtype=torch.float64, device=hessian.device)
    factor = torch.linalg.solve_triangular(upper, identity, upper=True, out=identity)
    return factor.float() if torch.isfinite(factor).all() else None
