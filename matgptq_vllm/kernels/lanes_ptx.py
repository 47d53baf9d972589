"""PTX for turning words of the kernel layout into weights: one word per plane in, eight pairs of weights out.

Triton's own code would handle one weight per instruction; this handles two or four, with lop3, prmt and packed floating
point. It is used through ``inline_asm_elementwise`` on int16 tensors with ``pack=2``: a register is the word of two columns.

Values decided by 2 or 3 bits come from a table: prmt looks up four at a time, low bytes and high bytes apart. Others are
made by putting bits into the mantissa of a number: v = BASE + 8 * (bits 7..4), and u = BASE + 8 * (bits 3..0), from which
exact arithmetic gives x, half of the straight level. ``nested`` and ``round`` end with x, whose factor is 2. ``curved`` ends
with x * (|x| + C): bend(2x) is 3/256 * x * (|x| + 320/3). The sum and the product are rounded to the type, which matters in
bfloat16, so C and the factor are fitted to the levels that result (0.1 to 0.2% from the exact ones in bfloat16).
"""

import hashlib
import struct
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

import torch

from matgptq_vllm.core.precision import PARENT_WIDTH, WIDTHS
from matgptq_vllm.core.slicing import SLICE_RULES, SliceRule, bend, levels

HELD_BITS = (2, 3, 4, 6, 8)
"""Bits that prefixes of the kernel planes hold."""

FIELDS = 8
"""Pairs of weights in a word of a two-bit plane, and in half of one of a one-bit plane."""

_TORCH = {"bf16": torch.bfloat16, "f16": torch.float16}

_BASE = {"bf16": 128.0, "f16": 1024.0}
"""Numbers whose mantissa's lowest bit is worth 1, so that bits 6..0 of the low byte hold an integer."""

EVEN_PAIRS = 0xCCCCCCCC
"""Of every four bits, the upper two."""


class Assembly(NamedTuple):
    """Text and operand constraints for ``inline_asm_elementwise``."""

    text: str
    constraints: str


@dataclass(frozen=True)
class LaneCode:
    """The assembly for activations of one type, as a compile-time argument of Triton kernels.

    Args:
        dtype: "bf16" or "f16", the type's name in PTX.
    """

    dtype: str

    def __post_init__(self) -> None:
        if self.dtype not in _TORCH:
            raise ValueError(f"weights can be made in bf16 or f16, not in {self.dtype!r}")

    def weights(self, width: int, half: int, rule: SliceRule) -> Assembly:
        """``weights`` for this type."""
        return weights(width, half, rule, self.dtype)

    def factor(self, width: int, rule: SliceRule) -> float:
        """``level_factor`` for this type."""
        return level_factor(width, rule, self.dtype)

    @property
    def cache_key(self) -> str:
        """Digest of all assembly: Triton keeps compiled kernels under it."""
        texts = [self.weights(width, half, rule).text for width in WIDTHS for half in (0, 1) for rule in SLICE_RULES]
        return hashlib.sha256("".join(texts).encode()).hexdigest()


def bits_needed(width: int, rule: str) -> int:
    """Bits of whole planes that decide the value at a width: one of ``HELD_BITS``."""
    # Kernels call it while they are compiled, so Triton reads this source, and allows plain types only in annotations.
    bits = min(width + 1, PARENT_WIDTH) if rule == "round" else width
    return next(held for held in HELD_BITS if held >= bits)


def level_factor(width: int, rule: SliceRule, dtype: str) -> float:
    """What the result of ``weights`` is multiplied with to give levels of ``core.slicing``."""
    if bits_needed(width, rule) <= 3:
        return 1.0
    return curve(width, dtype)[1] if rule == "curved" else 2.0


@cache
def curve(width: int, dtype: str) -> tuple[float, float]:
    """C and the factor with which factor * x * (|x| + C), computed in ``dtype``, is nearest to ``bend`` over all levels.

    Nearest in the sum of squares.
    """
    torch_type = _TORCH[dtype]
    straight = (torch.arange(1 << width, dtype=torch.float64) + 0.5) * 2.0 ** (PARENT_WIDTH - width) - 128
    exact, x = bend(straight), straight / 2
    best = (float("inf"), 0.0, 0.0)
    for constant in torch.linspace(100, 114, 225).to(torch_type).unique().double().tolist():
        curved = (x * (x.abs() + constant).to(torch_type).double()).to(torch_type).double()
        factor = (curved @ exact / (curved @ curved)).item()
        error = (factor * curved - exact).square().sum().item()
        best = min(best, (error, constant, factor))
    return best[1], best[2]


@cache
def weights(width: int, half: int, rule: SliceRule, dtype: str) -> Assembly:
    """Words of as many planes as the width needs -> the weights of the eight tiles of one half of a block.

    Args:
        half: which half; it matters for one-bit planes, whose words serve both.
        dtype: "bf16" or "f16".
    """
    bits = bits_needed(width, rule)
    writer = _Writer(FIELDS, HELD_BITS.index(bits) + 1, dtype)
    if bits == 2:
        _from_table(writer, _two_bits(writer), _table(width, rule, bits, dtype))
    elif bits == 3:
        _from_table(writer, _three_bits(writer, half), _table(width, rule, bits, dtype))
    else:
        _by_arithmetic(writer, width, half, rule, bits)
    return writer.assembly()


class _Writer:
    """Collects instructions; registers are named as they come."""

    def __init__(self, num_outputs: int, num_inputs: int, dtype: str):
        self.dtype = dtype
        self.base = _BASE[dtype]
        self.planes = [f"${num_outputs + index}" for index in range(num_inputs)]
        self._num_outputs = num_outputs
        self._lines: list[str] = []
        self._constants: dict[str, str] = {}
        self._kept: dict[str, str] = {}
        self._registers = 0

    def kept(self, value: int) -> str:
        """A register that holds ``value`` all the time. Known constants are copied to a register before every prmt, so the
        assembler must not know it: it is computed from two lane masks that never overlap."""
        return self._kept.setdefault(f"{value:#010x}", f"k{len(self._kept)}")

    def op(self, instruction: str, *operands: object) -> str:
        self._registers += 1
        target = f"r{self._registers}"
        self._lines.append(f"{instruction} {target}, {', '.join(map(str, operands))};")
        return target

    def word(self, value: int) -> str:
        """A register that holds ``value``."""
        return self._constants.setdefault(f"{value:#010x}", f"c{len(self._constants)}")

    def number(self, value: float) -> str:
        """A register that holds a number of the type in both halves."""
        return self.word(_lane(value, self.dtype) * 0x10001)

    def output(self, field: int, register: str) -> None:
        """Make the register, which the last instruction wrote, an output."""
        instruction, separator, operands = self._lines[-1].partition(f" {register}, ")
        assert separator, (self._lines[-1], register)
        self._lines[-1] = f"{instruction} ${field}, {operands}"

    def left(self, register: str, by: int) -> str:
        if by == 0:
            return register
        return self.op("shl.b32", register, by) if by > 0 else self.op("shr.u32", register, -by)

    def masked(self, register: str, byte_mask: int, byte_constant: int = 0) -> str:
        """(register & mask) | constant, in every byte."""
        return self.op("lop3.b32", register, f"{byte_mask * 0x01010101:#010x}", self.word(byte_constant * 0x01010101), "0xEA")

    def masked_lanes(self, register: str, mask: int) -> str:
        """A number of which only some mantissa bits stay."""
        lane = _lane(self.base, self.dtype)
        return self.op("lop3.b32", register, f"{mask * 0x10001:#010x}", self.word(lane * 0x10001), "0xEA")

    def merge(self, ones: str, zeros: str, mask: int) -> str:
        """Bits of ``ones`` where the mask is 1, of ``zeros`` where it is 0."""
        return self.op("lop3.b32", ones, zeros, f"{mask:#010x}", "0xE4")

    def permute(self, a: str, b: str, selector: int | str) -> str:
        return self.op("prmt.b32", a, b, f"{selector:#06x}" if isinstance(selector, int) else selector)

    def fma(self, a: str, b: float, c: str) -> str:
        return self.op(f"fma.rn.{self.dtype}x2", a, self.number(b), c)

    def add(self, a: str, b: float) -> str:
        return self.fma(a, 1.0, self.number(b))

    def assembly(self) -> Assembly:
        names = [f"r{index + 1}" for index in range(self._registers)] + list(self._constants.values())
        moves = [f"mov.b32 {name}, {value};" for value, name in self._constants.items()]
        if self._kept:
            names += ["own", "zero", *self._kept.values()]
            moves += ["mov.u32 own, %lanemask_eq;", "mov.u32 zero, %lanemask_lt;", "and.b32 zero, zero, own;"]
            moves += [f"or.b32 {name}, zero, {value};" for value, name in self._kept.items()]
        declaration = [f".reg .b32 {', '.join(names)};"] if names else []
        text = "\n".join(["{", *declaration, *moves, *self._lines, "}"])
        return Assembly(text, ",".join(["=r"] * self._num_outputs + ["r"] * len(self.planes)))


def _two_bits(writer: _Writer) -> tuple[str, str]:
    """4 + bits 7, 6 in every four bits: of the even fields, and of the odd fields."""
    word = writer.planes[0]
    return writer.masked(word, 0x33, 0x44), writer.masked(writer.left(word, -2), 0x33, 0x44)


def _three_bits(writer: _Writer, half: int) -> tuple[str, str]:
    """Bits 7 to 5 in the lower three of every four bits: of the even fields, and of the odd fields."""
    pairs, single = writer.planes
    result = []
    for odd in (0, 1):
        upper = writer.left(pairs, 1 - 2 * odd)
        lower = writer.left(single, -(2 * odd + half))
        result.append(writer.masked(writer.merge(upper, lower, 0x66666666), 0x77))
    return result[0], result[1]


def _table(width: int, rule: SliceRule, bits: int, dtype: str) -> list[int]:
    """Bit patterns of the values of all codes of ``bits`` bits."""
    codes = torch.arange(1 << bits, dtype=torch.uint8) << (PARENT_WIDTH - bits)
    values = levels(codes, width, rule).to(_TORCH[dtype])
    return [value & 0xFFFF for value in values.view(torch.int16).tolist()]


def _from_table(writer: _Writer, indices: tuple[str, str], table: list[int]) -> None:
    # A table of four is looked up in prmt's second operand, with 0 as the first: constants are free there only.
    low, high = _byte_table(writer, [value & 0xFF for value in table]), _byte_table(writer, [value >> 8 for value in table])
    for odd, index in enumerate(indices):
        for upper in (0, 1):
            # Four indices: of fields p and p + 2 of the first column, then of the second.
            selector = writer.left(index, -16) if upper else index
            low_bytes, high_bytes = writer.permute(*low, selector), writer.permute(*high, selector)
            writer.output(4 * upper + odd, writer.permute(low_bytes, high_bytes, 0x6240))
            writer.output(4 * upper + odd + 2, writer.permute(low_bytes, high_bytes, 0x7351))


def _byte_table(writer: _Writer, values: list[int]) -> tuple[str, str]:
    """The two operands of prmt for a table of four or eight bytes."""
    words = [
        sum(value << (8 * index) for index, value in enumerate(values[start : start + 4])) for start in range(0, len(values), 4)
    ]
    return ("0" if len(words) == 1 else writer.kept(words[0])), f"{words[-1]:#010x}"


def _by_arithmetic(writer: _Writer, width: int, half: int, rule: SliceRule, bits: int) -> None:
    planes = writer.planes
    # Bits 5 and 4 as pairs, at the places of plane 0's.
    upper = planes[1] if half else writer.left(planes[1], 1)
    lower = writer.left(planes[2], -1) if half else planes[2]
    high = _fours(writer, planes[0], writer.merge(upper, lower, 0xAAAAAAAA))
    low = _fours(writer, planes[3], planes[4]) if bits == 8 else None
    for odd in (0, 1):
        for above in (0, 1):
            v_bytes = writer.masked(writer.left(high[odd], 3 - 4 * above), 0b1111000)
            place = odd + 2 * above
            u_bytes = ""
            if low is not None:
                u_bytes = writer.masked(writer.left(low[odd], 3 - 4 * above), 0b1111000, _middle(width, rule))
            elif bits == 6:
                u_bytes = writer.masked(writer.left(planes[3], 5 - 2 * place), 0b1100000, _middle(width, rule))
            for upper_half in (0, 1):
                v = _to_lanes(writer, v_bytes, upper_half)
                u = _to_lanes(writer, u_bytes, upper_half) if u_bytes else ""
                x = _round(writer, width, v, u) if rule == "round" else _middle_of_bin(writer, width, v, u)
                writer.output(4 * upper_half + place, _curved(writer, width, x) if rule == "curved" else x)


def _fours(writer: _Writer, upper: str, lower: str) -> tuple[str, str]:
    """Pairs of bits of two words at the same places -> groups of four: of the even fields, and of the odd fields."""
    even = writer.merge(writer.left(upper, 2), lower, EVEN_PAIRS)
    odd = writer.merge(upper, writer.left(lower, -2), EVEN_PAIRS)
    return even, odd


def _to_lanes(writer: _Writer, register: str, upper_half: int) -> str:
    """Two bytes, each as the low byte of a number ``base`` or more."""
    top = writer.kept((_lane(writer.base, writer.dtype) >> 8) * 0x01010101)
    return writer.permute(register, top, 0x4342 if upper_half else 0x4140)


def _middle(width: int, rule: SliceRule) -> int:
    """A bit of u below its own, worth the middle of the bin of ``width`` after division by 16."""
    return 0 if rule == "round" else {8: 4, 6: 16}[width]


def _middle_of_bin(writer: _Writer, width: int, v: str, u: str) -> str:
    base = writer.base
    if width == 4:
        return writer.add(v, -(base + 64 - 4))
    return writer.fma(u, 1 / 16, writer.add(v, -(base + 64 + base / 16)))


def _curved(writer: _Writer, width: int, x: str) -> str:
    constant, _ = curve(width, writer.dtype)
    # abs is a floating point instruction; at 4 bits there are too many of those already.
    size = writer.op("and.b32", x, "0x7fff7fff") if width == 4 else writer.op(f"abs.{writer.dtype}x2", x)
    size = writer.add(size, constant)
    return writer.op(f"mul.{'rn.' if writer.dtype == 'bf16' else ''}{writer.dtype}x2", x, size)


def _round(writer: _Writer, width: int, v: str, u: str) -> str:
    """Half levels of the rule ``round``: the slice, one step more if the next bit is set, at most the widest."""
    base, half_step = writer.base, 2.0 ** (7 - width)
    lane_mask = {3: (v, 0b1110000), 4: (v, 0b1111000), 6: (u, 0b1100000), 8: (u, 0b1111000)}
    source, mask = lane_mask[width]
    kept = writer.masked_lanes(source, mask)
    floor = writer.add(kept, -(base + 64))
    if width > 4:
        floor = writer.fma(kept, 1 / 16, writer.add(v, -(base + 64 + base / 16)))
    if width == PARENT_WIDTH:
        return floor
    carrier, bit = {3: (v, 8), 4: (u, 64), 6: (u, 16)}[width]
    factor = half_step / bit
    carry = writer.fma(writer.masked_lanes(carrier, bit), factor, writer.number(-base * factor))
    return writer.op(f"min.{writer.dtype}x2", writer.fma(floor, 1.0, carry), writer.number(64 - half_step))


def _lane(value: float, dtype: str) -> int:
    """The 16 bits of a number that ``dtype`` holds exactly."""
    if dtype == "f16":
        bits = struct.unpack("<H", struct.pack("<e", value))[0]
        assert struct.unpack("<e", struct.pack("<H", bits))[0] == value
        return int(bits)
    bits = struct.unpack("<I", struct.pack("<f", value))[0]
    assert bits & 0xFFFF == 0, value
    return int(bits >> 16)
