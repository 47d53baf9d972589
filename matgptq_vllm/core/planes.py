"""Planes: the bits of a layer's codes, stored apart, most significant first, so that a prefix of planes is a slice.

Checkpoint layout of plane i of a layer, with w = plane_widths[i] (1, 2, 4 or 8) and codes of shape [N, K]:

    name     dtype   shape                  meaning
    plane{i} uint8   [N, ceil(K * w / 8)]   byte b of row n holds fields k = b * (8 / w) .. + 8 / w - 1, the first in the
                                            lowest bits; field k is bits shift(i) .. shift(i) + w - 1 of codes[n, k]

Rows and bytes are independent of each other, so a plane can be cut along N anywhere and along K at any multiple of 8.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch

from matgptq_vllm.core.errors import FormatError
from matgptq_vllm.core.precision import PARENT_WIDTH, WIDTHS
from matgptq_vllm.core.shapes import leading_planes, packed_columns

DEFAULT_PLANE_WIDTHS = (2, 1, 1, 2, 2)
"""Prefixes of these sum to every width of ``core.precision.WIDTHS``."""

K_ALIGNMENT = 8
"""Inputs of a shard must be a multiple of this, for every plane's shard to begin on a byte."""


@dataclass(frozen=True)
class PlaneLayout:
    """How the 8 bits of a code are divided into planes, most significant first."""

    plane_widths: tuple[int, ...] = DEFAULT_PLANE_WIDTHS

    def __post_init__(self) -> None:
        if (
            any(type(width) is not int or width not in (1, 2, 4, 8) for width in self.plane_widths)
            or sum(self.plane_widths) != PARENT_WIDTH
        ):
            raise FormatError(
                f"plane widths {list(self.plane_widths)} cannot be stored; "
                f"each must be 1, 2, 4 or 8 and their sum {PARENT_WIDTH}"
            )
        missing = set(WIDTHS) - {sum(self.plane_widths[:i]) for i in range(1, len(self.plane_widths) + 1)}
        if missing:
            raise FormatError(
                f"plane widths {list(self.plane_widths)} have no prefix of {sorted(missing)} bits; "
                f"every width of {list(WIDTHS)} must be the sum of the first planes"
            )

    def num_planes(self, bits: int) -> int:
        """Smallest number of leading planes that holds the top ``bits`` bits."""
        return leading_planes(self.plane_widths, bits)

    def shift(self, plane: int) -> int:
        """Position in a code of the lowest bit of plane ``plane``."""
        return PARENT_WIDTH - sum(self.plane_widths[: plane + 1])

    def packed_columns(self, plane: int, k: int) -> int:
        """Bytes per row of plane ``plane`` of a layer with ``k`` inputs."""
        return packed_columns(self.plane_widths[plane], k)

    def split(self, codes: torch.Tensor) -> list[torch.Tensor]:
        """Planes of ``codes`` (uint8 [N, K]), most significant first, each uint8 [N, packed_columns]."""
        return [
            _pack((codes >> self.shift(plane)) & ((1 << width) - 1), width) for plane, width in enumerate(self.plane_widths)
        ]

    def join(self, planes: Sequence[torch.Tensor], k: int, which: Sequence[int] | None = None) -> torch.Tensor:
        """Codes (uint8 [N, k]) from ``planes``, which are those of indices ``which`` (None: the leading ones); bits of other
        planes are 0."""
        codes = None
        for plane, packed in zip(range(len(planes)) if which is None else which, planes, strict=True):
            fields = _unpack(packed, self.plane_widths[plane], self.shift(plane), k)
            codes = fields if codes is None else codes.bitwise_or_(fields)
        if codes is None:
            raise ValueError("at least one plane is needed")
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


def _unpack(packed: torch.Tensor, width: int, shift: int, k: int) -> torch.Tensor:
    """uint8 [N, ceil(k * width / 8)] -> uint8 [N, k] of values below 2^width, shifted left by ``shift``."""
    table = _fields_of_bytes(width, shift).to(packed.device)
    fields = table.index_select(0, packed.reshape(-1).int()).view(packed.shape[0], -1)
    return fields.view(torch.uint8)[:, :k]


@lru_cache
def _fields_of_bytes(width: int, shift: int) -> torch.Tensor:
    """[256] integers of 8 / width bytes: the fields of every byte, shifted left, first field first in memory.

    Looking a byte up yields all its fields at once, four times as fast on a CPU as shifting and masking each. On the CPU: what
    is kept on a GPU beside the weights is gone when an engine has slept.
    """
    bytes_ = torch.arange(256, device="cpu")
    fields = [((bytes_ >> position) & ((1 << width) - 1)) << shift for position in range(0, 8, width)]
    word = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[8 // width]
    return torch.stack(fields, dim=1).to(torch.uint8).view(word).squeeze(1)
