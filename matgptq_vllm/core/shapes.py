"""Sizes of what a parent and a layer consist of, by arithmetic alone, so that code without torch can count bytes.

The kernel layout (``kernels.layout``) pads a layer [N, K] to N' and K': multiples of PAD_N and UNIT_K.
"""

from collections.abc import Sequence

from matgptq_vllm.core.precision import PARENT_WIDTH, check_width

SCALE_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}
"""Bytes of a scale, by the name of its type."""

KERNEL_PLANE_WIDTHS = (2, 1, 1, 2, 2)
"""Bits per plane of the kernel layout, whatever the checkpoint's."""

UNIT_N = 16
UNIT_K = 128
PIECE_K = 32
PIECES = UNIT_K // PIECE_K
"""Outputs and columns of a unit, columns of a piece."""

PAD_N = 64


def bits_read(width: int, rule: str) -> int:
    """How many top bits of a code decide its value at ``width`` under slice rule ``rule``."""
    check_width(width)
    return min(width + 1, PARENT_WIDTH) if rule == "round" else width


def leading_planes(plane_widths: Sequence[int], bits: int) -> int:
    """Smallest number of leading planes that holds the top ``bits`` bits."""
    total = 0
    for index, width in enumerate(plane_widths):
        total += width
        if total >= bits:
            return index + 1
    raise ValueError(f"a code has {PARENT_WIDTH} bits, {bits} were asked for")


def packed_columns(width: int, k: int) -> int:
    """Bytes per row of a checkpoint's plane of ``width`` bits of a layer with ``k`` inputs."""
    return -(-k * width // 8)


def num_groups(k: int, group_size: int) -> int:
    """Groups along K; ``group_size`` -1 is one group per output channel, and a ragged last group counts."""
    return 1 if group_size == -1 else -(-k // group_size)


def padded(size: int, multiple: int) -> int:
    """``size`` rounded up to a multiple."""
    return -(-size // multiple) * multiple


def kernel_plane_shapes(n: int, k: int) -> list[tuple[int, ...]]:
    """Shapes of all planes of a layer with ``n`` outputs and ``k`` inputs in the kernel layout; they are int32."""
    units = (padded(n, PAD_N) // UNIT_N, padded(k, UNIT_K) // UNIT_K)
    return [(*units, 32, PIECES * width // 2) for width in KERNEL_PLANE_WIDTHS]


def kernel_scales_shape(n: int, k: int, group_size: int) -> tuple[int, int, int, int]:
    """Shape of a layer's scales in the kernel layout; they are bfloat16 if the checkpoint's are, else float32."""
    groups = 1 if group_size == -1 else padded(k, UNIT_K) // group_size
    return padded(n, PAD_N) // UNIT_N, groups, UNIT_N // 2, 2
