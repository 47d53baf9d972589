"""Codes from planes on a CPU, eight at a time: plain torch on 64-bit words, no table per weight and no loop over bits.

A word of a 2-bit plane holds 32 fields, field 4i + j in bits 2j of byte i. Shifting and masking a word leaves the fields of
one j, a byte each, so 32 columns become four words of codes. They are left in that order, the word order:

    position in a chunk of 32 columns   8j + i
    column of W                         4i + j          i = 0..7, j = 0..3

and whoever multiplies brings the columns of x into the same order, which costs a copy of x instead of one of W. Groups of a
multiple of 32 columns stay together.

``core.planes`` has the bit order of planes. Its widths sum to 2, 4, 6 and 8 on the way, so the planes of two bits of a code
are one plane of 2 or two of 1; the latter are brought into the form of the former first.
"""

from collections.abc import Sequence

import torch
from torch.nn.functional import pad

from matgptq_vllm.core.planes import PlaneLayout
from matgptq_vllm.core.precision import PARENT_WIDTH

CHUNK = 32
"""Columns that are reordered among themselves; K is padded to a multiple."""

_WORD_BYTES = 8


def in_word_order(x: torch.Tensor) -> torch.Tensor:
    """x with its columns as ``signed_codes`` has them.

    Args:
        x: floating [M, K].

    Returns:
        float32 [M, K rounded up to CHUNK], new columns 0.
    """
    m, k = x.shape
    ragged = -k % CHUNK
    padded = pad(x, (0, ragged)) if ragged else x
    chunks = padded.reshape(m, (k + ragged) // CHUNK, _WORD_BYTES, CHUNK // _WORD_BYTES)
    return chunks.transpose(2, 3).to(torch.float32).reshape(m, k + ragged)


def signed_codes(planes: Sequence[torch.Tensor], layout: PlaneLayout) -> torch.Tensor:
    """Code - 128 of every weight, from leading planes.

    Args:
        planes: one or more leading planes, each uint8 [N, packed K].

    Returns:
        int64 [N * K / 32, 4] with K rounded up to CHUNK: as int8, the codes of row after row in word order. The bits of
        planes not given are 0; columns beyond K have any value.
    """
    pairs = _pairs(planes, layout)
    # Adding 128 modulo 256 is inverting the highest bit.
    high = pairs[0] ^ _SIGNS
    codes = torch.empty(high.numel(), CHUNK // _WORD_BYTES, dtype=torch.int64)
    if len(pairs) == 1:
        torch.bitwise_and(high << _PAIR_TO_TOP, _TOP_PAIRS, out=codes.t())
    elif len(pairs) == 2:
        nibbles = _nibbles(high, pairs[1])
        by_position = codes.view(-1, 2, 2).permute(1, 2, 0)
        torch.bitwise_and(nibbles << _NIBBLE_TO_TOP, _HIGH_NIBBLES, out=by_position)
    else:
        upper = _nibbles(high, pairs[1])
        lower = _nibbles(pairs[2], pairs[3] if len(pairs) == 4 else None)
        # The high nibbles of ``lower`` change places with the low nibbles of ``upper``.
        difference = ((lower >> 4) ^ upper) & _LOW_NIBBLES
        torch.bitwise_xor(lower, difference << 4, out=codes[:, :2].t())
        torch.bitwise_xor(upper, difference, out=codes[:, 2:].t())
    return codes


def keep_bits(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Words of codes (int64) with all but the top ``bits`` bits of every code 0, in new memory."""
    return codes & _TOP_BITS[bits]


def set_bit(codes: torch.Tensor, bit: int) -> torch.Tensor:
    """Words of codes (int64) with bit ``bit`` of every code 1, in new memory."""
    return codes | _ONE_BIT[bit]


def _pairs(planes: Sequence[torch.Tensor], layout: PlaneLayout) -> list[torch.Tensor]:
    """Bits 7-6, 5-4, 3-2 and 1-0 of codes, as far as given: int64 words in the form of a plane of 2 bits."""
    pairs: dict[int, torch.Tensor] = {}
    for index, plane in enumerate(planes):
        shift = layout.shift(index)
        if layout.plane_widths[index] == 2:
            words = _aligned(plane, _WORD_BYTES).view(-1).view(torch.int64)
        else:
            padded = _aligned(plane, _WORD_BYTES // 2)
            words = _SPREAD[shift % 2].index_select(0, padded.view(-1).int()).view(torch.int64)
        pair = shift // 2
        pairs[pair] = pairs[pair] | words if pair in pairs else words
    return list(pairs.values())


def _aligned(plane: torch.Tensor, multiple: int) -> torch.Tensor:
    """uint8 [N, bytes] -> the same, contiguous, at an address for words, with rows of a multiple of ``multiple`` bytes."""
    ragged = -plane.shape[1] % multiple
    if ragged:
        return pad(plane, (0, ragged))
    return plane.contiguous() if plane.storage_offset() % _WORD_BYTES == 0 else plane.clone()


def _nibbles(upper: torch.Tensor, lower: torch.Tensor | None) -> torch.Tensor:
    """Two pairs, int64 [words], as one nibble per column: int64 [2, words].

    Row e has j = e in the low nibble of byte i and j = e + 2 in the high one.
    """
    nibbles = upper.new_empty(2, upper.numel())
    if lower is None:
        torch.bitwise_and(upper, _HIGH_PAIRS, out=nibbles[1])
        torch.bitwise_and(upper << 2, _HIGH_PAIRS, out=nibbles[0])
    else:
        # As for nibbles in signed_codes, with pairs.
        difference = ((lower >> 2) ^ upper) & _LOW_PAIRS
        torch.bitwise_xor(upper, difference, out=nibbles[1])
        torch.bitwise_xor(lower, difference << 2, out=nibbles[0])
    return nibbles


def _every_byte(value: int) -> torch.Tensor:
    """int64 []: ``value`` in each of its bytes. A tensor, because a Python number is made one at every use."""
    return torch.tensor(int.from_bytes(bytes([value] * _WORD_BYTES), "little", signed=True))


def _spread(position: int) -> torch.Tensor:
    """int16 [256]: bit b of the index in bit 2b + position."""
    index = torch.arange(256)
    spread = sum(((index >> bit) & 1) << (2 * bit + position) for bit in range(8))
    assert isinstance(spread, torch.Tensor)
    return spread.to(torch.uint16).view(torch.int16)


_SIGNS = _every_byte(0xAA)
_LOW_PAIRS, _HIGH_PAIRS, _TOP_PAIRS = _every_byte(0x33), _every_byte(0xCC), _every_byte(0xC0)
_LOW_NIBBLES, _HIGH_NIBBLES = _every_byte(0x0F), _every_byte(0xF0)
_PAIR_TO_TOP = torch.tensor([[6], [4], [2], [0]])
_NIBBLE_TO_TOP = torch.tensor([[[4]], [[0]]])
_TOP_BITS = [_every_byte(0xFF & (0xFF << (PARENT_WIDTH - bits))) for bits in range(PARENT_WIDTH + 1)]
_ONE_BIT = [_every_byte(1 << bit) for bit in range(PARENT_WIDTH)]
_SPREAD = [_spread(0), _spread(1)]
