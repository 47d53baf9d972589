"""Planes: the bits of a layer's codes, stored apart, most significant first, so that a prefix of planes is a slice.

Checkpoint layout of plane i of a layer, with w = plane_widths[i] (1, 2, 4 or 8) and codes of shape [N, K]:

    name     dtype   shape                  meaning
    plane{i} uint8   [N, ceil(K * w / 8)]   byte b of row n holds fields k = b * (8 / w) .. + 8 / w - 1, the first in the
                                            lowest bits; field k is bits shift(i) .. shift(i) + w - 1 of codes[n, k]

Rows and bytes are independent of each other, so a plane can be cut along N anywhere and along K at any multiple of 8.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from matgptq_vllm.core.errors import FormatError
from matgptq_vllm.core.precision import PARENT_WIDTH, WIDTHS

DEFAULT_PLANE_WIDTHS = (2, 1, 1, 2, 2)
"""Prefixes of these sum to every width of ``core.precision.WIDTHS``."""

K_ALIGNMENT = 8
"""Inputs of a shard must be a multiple of this, for every plane's shard to begin on a byte."""


@dataclass(frozen=True)
class PlaneLayout:
    """How the 8 bits of a code are divided into planes, most significant first."""

    plane_widths: tuple[int, ...] = DEFAULT_PLANE_WIDTHS

    def __post_init__(self) -> None:
        if any(width not in (1, 2, 4, 8) for width in self.plane_widths) or sum(self.plane_widths) != PARENT_WIDTH:
            raise FormatError(
                f"plane widths {list(self.plane_widths)} cannot be stored; each must be 1, 2, 4 or 8 and their sum {PARENT_WIDTH}"
            )
        missing = set(WIDTHS) - {sum(self.plane_widths[:i]) for i in range(1, len(self.plane_widths) + 1)}
        if missing:
            raise FormatError(
                f"plane widths {list(self.plane_widths)} have no prefix of {sorted(missing)} bits; "
                f"every width of {list(WIDTHS)} must be the sum of the first planes"
            )

    def num_planes(self, bits: int) -> int:
        """Smallest number of leading planes that holds the top ``bits`` bits."""
        total = 0
        for index, width in enumerate(self.plane_widths):
            total += width
            if total >= bits:
                return index + 1
        raise ValueError(f"a code has {PARENT_WIDTH} bits, {bits} were asked for")

    def shift(self, plane: int) -> int:
        """Position in a code of the lowest bit of plane ``plane``."""
        return PARENT_WIDTH - sum(self.plane_widths[: plane + 1])

    def packed_columns(self, plane: int, k: int) -> int:
        """Bytes per row of plane ``plane`` of a layer with ``k`` inputs."""
        return -(-k * self.plane_widths[plane] // 8)

    def split(self, codes: torch.Tensor) -> list[torch.Tensor]:
        """Planes of ``codes`` (uint8 [N, K]), most significant first, each uint8 [N, packed_columns]."""
        return [
            _pack((codes >> self.shift(plane)) & ((1 << width) - 1), width)
            for plane, width in enumerate(self.plane_widths)
        ]

    def join(self, planes: Sequence[torch.Tensor], k: int) -> torch.Tensor:
        """Codes (uint8 [N, k]) from the leading ``planes``; the bits of planes not given are 0."""
        codes = torch.zeros((planes[0].shape[0], k), dtype=torch.uint8, device=planes[0].device)
        for plane, packed in enumerate(planes):
            codes |= _unpack(packed, self.plane_widths[plane], k) << self.shift(plane)
        return codes


def _pack(fields: torch.Tensor, width: int) -> torch.Tensor:
    """uint8 [N, K] of values below 2^width -> uint8 [N, ceil(K * width / 8)]."""
    per_byte = 8 // width
    n, k = fields.shape
    columns = -(-k // per_byte)
    padded = torch.nn.functional.pad(fields, (0, columns * per_byte - k)).view(n, columns, per_byte)
    packed = torch.zeros((n, columns), dtype=torch.uint8, device=fields.device)
    for position in range(per_byte):
        packed |= padded[:, :, position] << (position * width)
    return packed


def _unpack(packed: torch.Tensor, width: int, k: int) -> torch.Tensor:
    """uint8 [N, ceil(k * width / 8)] -> uint8 [N, k] of values below 2^width."""
    per_byte = 8 // width
    shifts = torch.arange(0, 8, width, dtype=torch.uint8, device=packed.device)
    fields = (packed.unsqueeze(-1) >> shifts) & ((1 << width) - 1)
    return fields.reshape(packed.shape[0], packed.shape[1] * per_byte)[:, :k]
