"""PTX for turning words of the kernel layout into weights: one word per plane in, eight pairs of weights out, a piece's share
of one lane, in the order of the left operands of its two tensor core products. Triton's own code would handle one weight
per instruction; this handles two or more, with lop3 and packed floating point. (prmt as a table is slower on Hopper.)

The bits of a magnitude go into the mantissa of a number v = BASE + magnitude, with the middle of what the width does not
read, on which exact arithmetic follows. ``nested`` subtracts a constant. ``curved`` is a square less a constant:
bend(a) = FACTOR * ((128 + a)^2 - 128^2). BASE is 128 in bfloat16, so one packed fma makes it; in float16 an addition comes
first. ``round`` adds half a step to the magnitude and clears what is below a step. The sign is put in last, which is why the
layout has codes as sign and magnitude.

At 2 bits, which are two signs' worth, ``nested`` and ``curved`` weights are the sum of two terms +-a and +-b, each of which
takes one instruction per pair; the tensor cores add them up.

Weights of all widths of a rule are in the same unit, ``FACTOR`` levels, so that sums of all widths are scaled alike; but for
``curved`` at 8 bits in bfloat16, whose numbers have no bit for the half step. What that misses is nearly in proportion to the
level: sums take ``unit`` once more, and weights are within 0.1% of levels before they are rounded.
"""

import hashlib
import struct
from collections.abc import Iterable
from functools import cache
from typing import NamedTuple, TypeVar

import torch

from matgptq_vllm.core.precision import PARENT_WIDTH, WIDTHS
from matgptq_vllm.core.slicing import BEND, SLICE_RULES, ZERO_LEVEL, SliceRule, levels
from matgptq_vllm.kernels.ptx_writer import PtxWriter

HELD_BITS = (2, 3, 4, 6, 8)
"""Bits that prefixes of the kernel planes hold."""

PAIRS = 8
"""Of weights, per lane and piece."""

FACTOR: dict[SliceRule, float] = {"nested": 1.0, "curved": BEND, "round": 1.0}
"""Levels per unit of the weights."""

_TORCH = {"bf16": torch.bfloat16, "f16": torch.float16}

_BASE = {"bf16": 128.0, "f16": 1024.0}
"""Numbers whose mantissa's lowest bit is worth 1, so that the low byte holds an integer."""

_AND = "0xC0"
_XNOR = "0xC3"
"""~(a ^ b)"""
_AND_OR = "0xEA"
"""(a & b) | c"""
_XOR_AND = "0x78"
"""a ^ (b & c)"""


class Assembly(NamedTuple):
    """Text and operand constraints for ``inline_asm_elementwise``."""

    text: str
    constraints: str


_Code = TypeVar("_Code", bound="PtxCode")


class PtxCode(str):
    """Assembly for activations of one type, as a compile-time argument of Triton kernels.

    It is text, the type's name and a digest of all assembly: Triton keeps compiled kernels under it, and programs that watch
    Triton compile, as vLLM does, write it down as JSON.

    Args:
        dtype: "bf16" or "f16", the type's name in PTX.
    """

    __slots__ = ("dtype",)

    dtype: str

    def __new__(cls: type[_Code], dtype: str) -> _Code:
        if dtype not in _TORCH:
            raise ValueError(f"weights can be made in bf16 or f16, not in {dtype!r}")
        code = super().__new__(cls, f"{dtype} {_digest(cls, dtype)}")
        code.dtype = dtype
        return code

    @classmethod
    def of(cls: type[_Code], dtype: torch.dtype) -> _Code:
        """That for activations of a type of torch, float16 if it is not bfloat16; made once."""
        return _code_of(cls, "bf16" if dtype == torch.bfloat16 else "f16")

    @classmethod
    def assemblies(cls, dtype: str) -> Iterable[Assembly]:
        """All that a kernel may get by the methods of a code."""
        raise NotImplementedError

    def unit(self, width: int, rule: SliceRule) -> float:
        """``unit`` for this type."""
        return unit(width, rule, self.dtype)


@cache
def _code_of(code: type[_Code], dtype: str) -> _Code:
    return code(dtype)


@cache
def _digest(code: type[PtxCode], dtype: str) -> str:
    return hashlib.sha256("".join(assembly.text for assembly in code.assemblies(dtype)).encode()).hexdigest()[:16]


class LaneCode(PtxCode):
    """The assembly of the product for few rows, and of expanding."""

    __slots__ = ()

    @classmethod
    def assemblies(cls, dtype: str) -> Iterable[Assembly]:
        """All that a kernel may get by the methods of a code."""
        yield from (weights(width, half, rule, dtype) for width in WIDTHS for half in (0, 1) for rule in SLICE_RULES)
        yield from (product(dtype, first) for first in (False, True))
        yield from (load_four(), load_two())

    def weights(self, width: int, half: int, rule: SliceRule) -> Assembly:
        """``weights`` for this type."""
        return weights(width, half, rule, self.dtype)

    def product(self, first: bool) -> Assembly:
        """``product`` for this type."""
        return product(self.dtype, first)

    def load_four(self) -> Assembly:
        """``load_four``, which is the same for all types."""
        return load_four()

    def load_two(self) -> Assembly:
        """``load_two``, which is the same for all types."""
        return load_two()


def bits_needed(width: int, rule: str) -> int:
    """Bits of whole planes that decide the value at a width: one of ``HELD_BITS``."""
    # Kernels call it while they are compiled, so Triton reads this source, and allows plain types only in annotations.
    bits = min(width + 1, PARENT_WIDTH) if rule == "round" else width
    return next(held for held in HELD_BITS if held >= bits)


def product(dtype: str, first: bool) -> Assembly:
    """One tensor core product: four words of weights, two of x and, unless it is the ``first``, four sums -> the new sums.

    Sums are float32.
    """
    sums = "zero, zero, zero, zero" if first else "$10, $11, $12, $13"
    lines = [".reg .f32 zero;", "mov.f32 zero, 0f00000000;"] if first else []
    instruction = f"mma.sync.aligned.m16n8k16.row.col.f32.{dtype}.{dtype}.f32"
    lines.append(f"{instruction} {{$0, $1, $2, $3}}, {{$4, $5, $6, $7}}, {{$8, $9}}, {{{sums}}};")
    return Assembly("\n".join(["{", *lines, "}"]), ",".join(["=f"] * 4 + ["r"] * 6 + ["f"] * (0 if first else 4)))


def load_four() -> Assembly:
    """An address -> four adjacent words that are read only once, and never written meanwhile: not through the first cache."""
    return Assembly("ld.global.nc.L1::no_allocate.v4.b32 {$0, $1, $2, $3}, [$4];", "=r,=r,=r,=r,l")


def load_two() -> Assembly:
    """As ``load_four``, two words."""
    return Assembly("ld.global.nc.L1::no_allocate.v2.b32 {$0, $1}, [$2];", "=r,=r,l")


def num_terms(width: int, rule: str) -> int:
    """How many products a pair of weights takes part in: their terms add up to the weights."""
    return 2 if width == 2 and rule != "round" else 1


@cache
def weights(width: int, half: int, rule: SliceRule, dtype: str) -> Assembly:
    """Words of as many planes as the width needs -> 8 pairs of weights of one piece per term, four for each product.

    Args:
        half: the piece's number modulo 2; it matters for one-bit planes, whose words serve two pieces.
        dtype: "bf16" or "f16".
    """
    bits = bits_needed(width, rule)
    writer = _Writer(PAIRS * num_terms(width, rule), HELD_BITS.index(bits) + 1, dtype)
    if num_terms(width, rule) == 2:
        _two_terms(writer, rule)
    else:
        for i in (0, 1):
            magnitudes, signs = _codes(writer, i, half, bits, width, rule)
            for pair in range(4):
                value = _value(writer, magnitudes[pair], width, rule)
                writer.output(4 * i + pair, _signed(writer, value, signs[pair], width, rule))
    return writer.assembly()


def _square_at_zero(width: int, dtype: str) -> float:
    """What is subtracted from the square of a magnitude's number."""
    # Without the half step, the nearest to the level of magnitude 0 that bfloat16 holds.
    return ZERO_LEVEL**2 - (ZERO_LEVEL if width == PARENT_WIDTH and _BASE[dtype] == ZERO_LEVEL else 0)


@cache
def unit(width: int, rule: SliceRule, dtype: str) -> float:
    """What weights of a width are in, in units of ``FACTOR`` levels."""
    if rule != "curved" or width < PARENT_WIDTH or _BASE[dtype] != ZERO_LEVEL:
        return 1.0
    magnitudes = torch.arange(ZERO_LEVEL)
    exact = levels((magnitudes | ZERO_LEVEL).to(torch.uint8), width, rule).double() / FACTOR[rule]
    made = (magnitudes + ZERO_LEVEL).double().square() - _square_at_zero(width, dtype)
    return ((made * exact).sum() / made.square().sum()).item()


class _Writer(PtxWriter):
    """Of the weights of a piece: knows its operands, and numbers of the type."""

    def __init__(self, num_outputs: int, num_inputs: int, dtype: str):
        super().__init__()
        self.dtype = dtype
        self.base = _BASE[dtype]
        self.planes = [f"${num_outputs + index}" for index in range(num_inputs)]
        self._num_outputs = num_outputs
        self._constants: dict[str, str] = {}

    def number(self, value: float) -> str:
        """A register that holds a number of the type in both halves."""
        word = _lane(value, self.dtype) * 0x10001
        return self._constants.setdefault(f"{word:#010x}", f"c{len(self._constants)}")

    def output(self, number: int, register: str) -> None:
        """Make the register, which one of the instructions wrote, an output."""
        for index, line in enumerate(self.lines):
            instruction, separator, operands = line.partition(f" {register}, ")
            if separator:
                self.lines[index] = f"{instruction} ${number}, {operands}"
                return
        raise AssertionError(register)

    def magic(self, low: int) -> str:
        """A register that holds BASE + ``low`` in both halves, as bits."""
        return self.number(self.base + low)

    def add(self, a: str, b: float) -> str:
        return self.op(f"fma.rn.{self.dtype}x2", a, self.number(1.0), self.number(b))

    def square(self, a: str, b: float) -> str:
        return self.op(f"fma.rn.{self.dtype}x2", a, a, self.number(b))

    def least(self, a: str, b: float) -> str:
        return self.op(f"min.{self.dtype}x2", a, self.number(b))

    def assembly(self) -> Assembly:
        text = self.text({name: value for value, name in self._constants.items()})
        return Assembly(text, ",".join(["=r"] * self._num_outputs + ["r"] * len(self.planes)))


def _two_terms(writer: _Writer, rule: SliceRule) -> None:
    """Level = +-(near + far) / 2 +- (far - near) / 2: the first sign is the code's, the second says if the two agree."""
    word = writer.planes[0]
    near, far = (levels(torch.tensor([code], dtype=torch.uint8), 2, rule).item() / FACTOR[rule] for code in (128, 192))
    # Below every sign is bit 6 of the magnitude.
    second = writer.lop3(word, writer.left(word, 1), 0, _XNOR)
    for term, (signs, size) in enumerate(((word, (far + near) / 2), (second, (far - near) / 2))):
        for i in (0, 1):
            for pair in range(4):
                shifted = writer.left(signs, _sign_shift(i, pair))
                result = writer.lop3(shifted, 0x80008000, writer.number(size), _AND_OR)
                writer.output(PAIRS * term + 4 * i + pair, result)


def _codes(writer: _Writer, i: int, half: int, bits: int, width: int, rule: SliceRule) -> tuple[list[str], list[str]]:
    """Of codes (i, m) and (i, m + 4), four words with magnitudes in the low bytes of their halves, and four with signs on top.

    The rest of a word is anything.
    """
    upper = _nibbles(writer, i, half, min(bits, 4))
    if bits <= 4:
        even, odd = writer.left(upper, 4), upper
        later = writer.left(upper, -8)
        magnitudes = [even, odd, writer.left(later, 4), later]
    else:
        lower = _low_nibbles(writer, i, width, rule)
        even = writer.select(writer.left(upper, 4), lower, 0xF0F0F0F0)
        odd = writer.select(upper, writer.left(lower, -4), 0xF0F0F0F0)
        magnitudes = [even, odd, writer.left(even, -8), writer.left(odd, -8)]
    return magnitudes, [writer.left(even, 8), writer.left(odd, 8), even, odd]


def _nibbles(writer: _Writer, i: int, half: int, bits: int) -> str:
    """The sign and magnitude bits 6 to 4, as far as they are among the top ``bits``, of code (i, n) in bits 4n + 3 to 4n.

    The other bits are anything.
    """
    q = 2 * half + i
    result = writer.left(writer.planes[0], 2 * i)
    if bits >= 3:
        result = writer.select(result, writer.left(writer.planes[1], 1 - (q ^ 1)), 0xCCCCCCCC)
    if bits >= 4:
        result = writer.select(result, writer.left(writer.planes[2], -q), 0xEEEEEEEE)
    return result


def _low_nibbles(writer: _Writer, i: int, width: int, rule: SliceRule) -> str:
    """Magnitude bits 3 to 0 of code (i, n) in bits 4n + 3 to 4n, as far as they are held."""
    result = writer.left(writer.planes[3], 2 * i)
    if len(writer.planes) == 4:
        return result
    return writer.select(result, writer.left(writer.planes[4], -2 * i), 0xCCCCCCCC)


def _value(writer: _Writer, word: str, width: int, rule: SliceRule) -> str:
    """Magnitudes of a pair of weights, from a word of ``_codes``."""
    step = 1 << (PARENT_WIDTH - width)
    if rule == "round":
        if width < PARENT_WIDTH:
            # The sum may carry into bit 7, where BASE's number has a bit of the exponent or the mantissa of the right worth.
            word = writer.lop3(word, (128 - step // 2) * 0x10001, 0, _AND)
            word = writer.op("add.u32", word, f"{step // 2 * 0x10001:#010x}")
        number = writer.lop3(word, (256 - step if width < PARENT_WIDTH else 127) * 0x10001, writer.magic(0), _AND_OR)
        return writer.add(number, (0.5 if width == PARENT_WIDTH else 0.0) - writer.base)
    number = writer.lop3(word, (128 - step) * 0x10001, writer.magic(step // 2), _AND_OR)
    if rule == "curved":
        if writer.base != ZERO_LEVEL:
            number = writer.add(number, ZERO_LEVEL - writer.base + (0.5 if width == PARENT_WIDTH else 0.0))
        return writer.square(number, -_square_at_zero(width, writer.dtype))
    return writer.add(number, (0.5 if width == PARENT_WIDTH else 0.0) - writer.base)


def _signed(writer: _Writer, value: str, signs: str, width: int, rule: SliceRule) -> str:
    result = writer.lop3(value, signs, 0x80008000, _XOR_AND)
    if rule == "round":
        if width == PARENT_WIDTH:
            return writer.add(result, -0.5)
        # The only slices that are not symmetric: the negative side has one step more.
        return writer.least(result, 128.0 - (1 << (PARENT_WIDTH - width)))
    return result


def _sign_shift(i: int, pair: int) -> int:
    """Left shift that brings the signs of codes (i, pair) and (i, pair + 4) to bits 15 and 31."""
    return 12 - 4 * pair + 2 * i


def _lane(value: float, dtype: str) -> int:
    """Bit pattern of a number in the type."""
    if dtype == "f16":
        return int(struct.unpack("<H", struct.pack("<e", value))[0])
    return int(struct.unpack("<I", struct.pack("<f", value))[0] >> 16)
