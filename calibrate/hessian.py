"""Hessian of a layer's squared output error: accumulate it over batches, damp it, factor its inverse.

For inputs X [tokens, K] the Hessian of ||X (W - W')^T||^2 in a row of W is, up to a factor, H = X^T X / tokens [K, K].
The column loop needs the upper Cholesky factor U of H^-1 (GPTQ, arXiv 2210.17323, section 3.3).
"""

import warnings

import torch

DAMP_GROWTH = 10.0
MAX_ATTEMPTS = 5


class HessianAccumulator:
    """Mean of x x^T over tokens, in float32.

    Args:
        k: inputs of the layer.
    """

    def __init__(self, k: int, device: torch.device | str = "cpu"):
        self._sum = torch.zeros((k, k), dtype=torch.float32, device=device)
        self._num_tokens = 0

    def add(self, inputs: torch.Tensor) -> None:
        """Add a batch of inputs, floating [..., K]."""
        rows = inputs.reshape(-1, inputs.shape[-1]).float()
        self._sum.addmm_(rows.t(), rows)
        self._num_tokens += rows.shape[0]

    def mean(self) -> torch.Tensor:
        """float32 [K, K]."""
        return self._sum / max(self._num_tokens, 1)


def damped(hessian: torch.Tensor, damp: float) -> torch.Tensor:
    """``hessian`` [K, K] plus ``damp`` times its mean diagonal on the diagonal; the identity if the inputs were all 0.

    Inputs that calibration never saw get the damping alone: their weights are rounded to nearest.
    """
    mean = hessian.diagonal().mean()
    result = hessian.clone()
    result.diagonal().add_(damp * mean if mean > 0 else 1.0)
    return result


def inverse_factor(hessian: torch.Tensor, damp: float, name: str) -> torch.Tensor:
    """Upper Cholesky factor U of the inverse of the damped Hessian: U^T U = H^-1.

    Damping is raised tenfold, with a warning, while H cannot be factored; after five attempts the identity is
    returned, which means rounding to nearest.

    Args:
        hessian: float32 [K, K].
        damp: share of the mean diagonal to add.
        name: the layer, for warnings.

    Returns:
        float32 [K, K], zero below the diagonal.
    """
    for _ in range(MAX_ATTEMPTS):
        factor = _factor(damped(hessian, damp).double())
        if factor is not None:
            return factor.float()
        warnings.warn(
            f"{name}: its Hessian is not positive definite with damping {damp:g}; trying {damp * DAMP_GROWTH:g}. "
            "More calibration text, or a larger --damp, avoids this",
            stacklevel=2,
        )
        damp *= DAMP_GROWTH
    warnings.warn(f"{name}: its Hessian cannot be factored; the layer is rounded to nearest", stacklevel=2)
    return torch.eye(hessian.shape[0], dtype=torch.float32, device=hessian.device)


def _factor(hessian: torch.Tensor) -> torch.Tensor | None:
    lower, failed = torch.linalg.cholesky_ex(hessian)
    if failed.item() or not torch.isfinite(lower).all():
        return None
    upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
    return None if failed.item() or not torch.isfinite(upper).all() else upper
