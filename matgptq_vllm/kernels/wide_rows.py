"""Which rows a program of the wide product (kernels.wide) multiplies: row tiles of one width (kernels.arrange)."""

# Gluon has no unpacking inside a tuple.
# ruff: noqa: RUF005

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from matgptq_vllm.kernels.wide_layouts import WARPS


@gluon.jit
def count_rows(token_profiles, profile_widths, m, WIDTHS: gl.constexpr, ROWS: gl.constexpr):
    """Rows of each of WIDTHS, of the first ``m``, which are ROWS at most."""
    rows_of_widths = ()
    if len(WIDTHS) == 1:
        rows_of_widths = (m,)
    else:
        row = gl.arange(0, ROWS, layout=gl.BlockedLayout([1], [32], [WARPS], [0]))
        profile = gl.load(token_profiles + row, mask=row < m, other=0)
        widths = gl.load(profile_widths + profile, mask=row < m, other=0)
        for index in gl.static_range(len(WIDTHS)):
            rows_of_widths = rows_of_widths + (gl.sum((widths == WIDTHS[index]).to(gl.int32), 0),)
    return rows_of_widths


@gluon.jit
def row_tile_of(rows_of_widths, row_tile, WIDTHS: gl.constexpr, BLOCK_M: gl.constexpr):
    """Width of a row tile, 0 if there is no such one, and how many rows it has: rows of one width take tiles of their own."""
    width, count, first = 0, 0, 0
    for index in gl.static_range(len(WIDTHS)):
        rows = rows_of_widths[index]
        tiles = (rows + BLOCK_M - 1) // BLOCK_M
        mine = (row_tile >= first) & (row_tile < first + tiles)
        width = gl.where(mine, WIDTHS[index], width)
        count = gl.where(mine, gl.minimum(rows - (row_tile - first) * BLOCK_M, BLOCK_M), count)
        first += tiles
    return width, count
