"""One pass over a run of columns of a layer: choose a code, tell the columns to come what error it leaves, go on.

Both passes of calibration are this one, with other numbers in it. With M a square of the factor U of the inverse Hessian
or of the Hessian H itself, and u_j what the columns before j in the run have passed on:

    pass       target t_j                          passed on                    M
    column     base_j - sum over i of M_ij u_i     (t_j - s L(q)) / U_jj        U
    descent    v_j + (base_j - ...) / H_jj         s L(q) - v_j                 H

``column`` is GPTQ's loop (arXiv 2210.17323, algorithm 1), base being the weights with the errors of earlier runs made up
for. ``descent`` is coordinate descent on the squared error of the outputs, base being the gradient H (W - V)^T, and v the
values before. Every width has its own base, M, target and error; the code alone is shared.

    name         shape            dtype
    base         [5, run, N]      float32, a row per width of WIDTHS
    values       [5, run, N]      float32; descent: values at each width, updated in place; column: only written
    squares      [5, run, run]    float32, M
    scales       [run, N]         float32, of each column
    weights      [5]              float32, of each width in the joint objective
"""

import torch

from calibrate.objective import LevelTables, choose


def sweep_columns(
    base: torch.Tensor,
    values: torch.Tensor,
    squares: torch.Tensor,
    scales: torch.Tensor,
    weights: torch.Tensor,
    tables: LevelTables,
    descent: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes uint8 [run, N], and what each column passes on, float32 [5, run, N]. The twin of ``column_kernel``.

    ``values`` is left holding the values of the codes.
    """
    _, run, n = base.shape
    codes = torch.empty((run, n), dtype=torch.uint8, device=base.device)
    passed = torch.zeros_like(base)
    diagonal = squares.diagonal(dim1=1, dim2=2)[:, :, None]  # [5, run, 1]
    for column in range(run):
        scale = scales[column]
        divisor = torch.where(scale > 0, scale, 1.0)
        pivot = diagonal[:, column]  # [5, 1]
        target = base[:, column]
        if column:
            target = target - torch.bmm(squares[:, None, :column, column], passed[:, :column])[:, 0]
        if descent:
            target = values[:, column] + target / pivot
            importance = weights[:, None] * pivot * divisor.square()
        else:
            importance = weights[:, None] / pivot.square() * divisor.square()
        chosen = choose(target / divisor, importance, tables)
        found = tables.levels[:, chosen.int()].mul_(scale)
        passed[:, column] = found - values[:, column] if descent else (target - found) / pivot
        values[:, column] = found
        codes[column] = chosen
    return codes, passed
