"""What the parts of the wide product (kernels.wide) share: layouts of registers."""

import triton
from triton.experimental.gluon import language as gl

from matgptq_vllm.kernels import wide_config

WARPS = gl.constexpr(wide_config.WARPS)


@triton.constexpr_function
def warp_bases(warps, dims, stride):
    bases, warp = [], 1
    while warp < warps:
        bases.append([warp * stride] + [0] * (dims - 1))
        warp *= 2
    return bases


@triton.constexpr_function
def words_layout(warps, count, tiles=1):
    """[tiles * warps * 32 * count]: ``count`` adjacent words per lane, 1, 2 or 4, of tiles w, warps + w, ... for warp w."""
    registers = [[1], [2]][: count // 2] + [[32 * count * warps * (1 << bit)] for bit in range(tiles.bit_length() - 1)]
    lanes = [[count << bit] for bit in range(5)]
    return gl.DistributedLinearLayout(registers, lanes, warp_bases(warps, 1, 32 * count), [], [tiles * warps * 32 * count])


@triton.constexpr_function
def sums_layout(warps, rows):
    return gl.NVMMADistributedLayout([3, 0], [warps, 1], [16, rows, 16])
