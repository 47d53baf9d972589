"""Coordinate descent: change one code at a time where that lowers the squared error of the layer's outputs.

The column loop never looks back: a column whose decided bits keep it from its best value leaves an error that only later
columns can make up for. Descent lets all of them. With the error E = W - V of the values V at the stage's widths and the
Hessian H, the gradient of tr(E H E^T) in column j is (E H)_j, and its minimum in that column alone lies at
V_j + (E H)_j / H_jj.
"""

from collections.abc import Callable

import torch

from calibrate.objective import Bounds, JointObjective
from calibrate.scales import divisor


def descend(
    columns: torch.Tensor,
    codes: torch.Tensor,
    hessian: torch.Tensor,
    scale_of: Callable[[int], torch.Tensor],
    objective: JointObjective,
    bounds: Bounds,
    num_sweeps: int,
) -> torch.Tensor:
    """Better codes for the mean value at the objective's compensation widths.

    Args:
        columns: float32 [K, N], the original weights.
        codes: uint8 [K, N] to start from.
        hessian: float32 [K, K], damped.
        scale_of: scales [N] of a column.
        bounds: codes allowed for each weight, uint8 [K, N] both.
        num_sweeps: how often to go through all columns.

    Returns:
        codes uint8 [K, N].
    """
    codes = codes.clone()
    scales = torch.stack([scale_of(column) for column in range(columns.shape[0])])
    values = objective.mean_levels(codes).mul_(scales)
    gradient = hessian @ (columns - values)
    curvature = hessian.diagonal().tolist()
    for _ in range(num_sweeps):
        for column, scale in enumerate(scales):
            if curvature[column] <= 0:
                continue  # only in a Hessian that could not be factored
            best = values[column] + gradient[column] / curvature[column]
            codes[column] = objective.choose(best / divisor(scale), (bounds[0][column], bounds[1][column]))
            value = objective.mean_levels(codes[column]).mul_(scale)
            gradient.addr_(hessian[column], value - values[column], alpha=-1)
            values[column] = value
    return codes
