"""PTX for products in integers: weights of few bits as bytes, x as two bytes per number, on tensor cores that multiply bytes.

Where at most 3 bits decide a weight (``takes_digits``), its level is one of 8 at most, and ``prmt`` looks four of them up in a
table of 8 bytes with one instruction. Levels are integers times a unit (``level_table``): exactly for ``nested`` and
``round``, and for ``curved`` at 2 bits; at 3 within 0.4%.

x is cut into runs of 128 columns, each in units of 1 / 32512 of its greatest: 256 * upper + lower, two signed bytes, the
"digits". So sums of products with either digit are integers below 2^22, and come out as floating point numbers if the sum
starts as the bits of SUM_START.
"""

import struct
from collections.abc import Iterable
from functools import cache

import torch

from matgptq_vllm.core.precision import WIDTHS
from matgptq_vllm.core.slicing import SLICE_RULES, SliceRule, levels
from matgptq_vllm.kernels.lanes_ptx import _SELECT, FACTOR, Assembly, LaneCode, bits_needed

DIGIT_STEPS = 127 * 256
"""Steps of x from 0 to its greatest."""

SUM_START = 12582912.0
"""1.5 * 2^23: added to an integer below 2^22 as bits, it gives the bits of their sum as float32."""

MAX_BYTE = 127


class SmallCode(LaneCode):
    """The assembly of the product for few rows that shares x (kernels.small)."""

    __slots__ = ()

    @classmethod
    def assemblies(cls, dtype: str) -> Iterable[Assembly]:
        """All that a kernel may get by the methods of a code."""
        yield from LaneCode.assemblies(dtype)
        cases = [(width, rule) for width in WIDTHS for rule in SLICE_RULES if takes_digits(width, rule)]
        yield from (level_bytes(width, half, rule, flag) for width, rule in cases for half in (0, 1) for flag in (False, True))
        yield from (digit_product(first, upper) for first in (False, True) for upper in (False, True))
        yield digit_words(dtype)

    def level_bytes(self, width: int, half: int, rule: SliceRule, paired: bool) -> Assembly:
        """``level_bytes``, which is the same for all types."""
        return level_bytes(width, half, rule, paired)

    def level_words(self, width: int, rule: SliceRule) -> tuple[int, ...]:
        """``level_words`` as signed numbers."""
        return tuple((word ^ 1 << 31) - (1 << 31) for word in level_words(width, rule))

    def unit_scale(self, width: int, rule: SliceRule) -> float:
        """What a step of the upper digits times one of the levels is worth, in units of the greatest x and ``FACTOR``."""
        return level_table(width, rule)[0] / FACTOR[rule] / (DIGIT_STEPS // 256) if takes_digits(width, rule) else 1.0

    def digit_product(self, first: bool, upper: bool) -> Assembly:
        """``digit_product``, which is the same for all types."""
        return digit_product(first, upper)

    def digit_words(self) -> Assembly:
        """``digit_words`` for this type."""
        return digit_words(self.dtype)


def takes_digits(width: int, rule: str) -> bool:
    """Whether products at a width are in integers."""
    # Kernels call it while they are compiled, so Triton reads this source, and allows no call.
    return width < 3 or (width == 3 and rule != "round")


@cache
def level_table(width: int, rule: SliceRule) -> tuple[float, tuple[int, ...]]:
    """(unit, integers): level = unit * integer, as near as bytes allow, per sign (1: negative) and magnitude's bits 6 and 5.

    Of widths that 2 bits decide, bit 5 makes no difference.
    """
    magnitudes = torch.arange(4, dtype=torch.uint8) << 5
    exact = levels(torch.cat([magnitudes | 128, ~(magnitudes | 128)]), width, rule).double()
    best = (float("inf"), 0.0, torch.zeros(8))
    for greatest in range(1, MAX_BYTE + 1):
        integers = (exact * (greatest / exact.abs().max())).round()
        unit = ((integers * exact).sum() / integers.square().sum()).item()
        error = ((integers * unit - exact) / exact.abs().clamp(min=1)).abs().max().item()
        # Of tables that are as good, the smallest.
        if error < best[0] - 1e-6:
            best = (error, unit, integers)
    return best[1], tuple(int(integer) for integer in best[2])


@cache
def level_words(width: int, rule: SliceRule) -> tuple[int, ...]:
    """The table as ``level_bytes`` needs it: four bytes per word, by the index that comes cheapest."""
    orders = ("s6",) if bits_needed(width, rule) == 2 else ("5s6", "s65")
    return tuple(word for order in orders for word in _table_words(level_table(width, rule)[1], order))


@cache
def level_bytes(width: int, half: int, rule: SliceRule, paired: bool) -> Assembly:
    """Words of as many planes as the width needs -> levels, four words of bytes.

    Of a lane's 8 columns in kernels.layout, the words hold columns 0-3 of output g, of output g + 8, columns 4-7 of g, of
    g + 8: the left operand of one product of 32 columns. If ``paired``, which takes fewer instructions, they hold columns 0
    and 2, 1 and 3, 4 and 6, 5 and 7, of g in the even bytes and g + 8 in the odd. Operands: these; words of planes;
    ``level_words``.

    Args:
        half: the piece's number modulo 2.
    """
    two = bits_needed(width, rule) == 2
    lines, registers = [], 0

    def op(instruction: str, *operands: object) -> str:
        nonlocal registers
        registers += 1
        lines.append(f"{instruction} r{registers}, {', '.join(map(str, operands))};")
        return f"r{registers}"

    def select(a: str, b: str, mask: int) -> str:
        return op("lop3.b32", a, b, f"{mask:#010x}", _SELECT)

    def shifted(word: str, left: int) -> str:
        return op("shl.b32", word, left) if left > 0 else op("shr.u32", word, -left) if left else word

    plane0, plane1 = "$4", "$5"
    for i in (0, 1):
        # Index of a level, in bits 4n on of code (i, n): bit 3 has to be 0.
        if two:
            low = high = "$5"
            index = op("and.b32", shifted(plane0, -2 + 2 * i), "0x33333333")
        elif (half, i) == (0, 0):
            low, high = "$8", "$9"
            index = op("and.b32", shifted(select(plane0, plane1, 0xCCCCCCCC), -1), "0x77777777")
        else:
            low, high = "$6", "$7"
            left = {(0, 1): 2, (1, 0): -1, (1, 1): 0}[half, i]
            joined = select(shifted(plane0, -2 + 2 * i), shifted(plane1, left), 0x33333333)
            index = op("and.b32", joined, "0x77777777")
        if paired:
            lines.append(f"prmt.b32 ${2 * i}, {low}, {high}, {index};")
            lines.append(f"prmt.b32 ${2 * i + 1}, {low}, {high}, {shifted(index, -16)};")
            continue
        even = op("prmt.b32", low, high, index)
        odd = op("prmt.b32", low, high, shifted(index, -16))
        lines.append(f"prmt.b32 ${2 * i}, {even}, {odd}, 0x6240;")
        lines.append(f"prmt.b32 ${2 * i + 1}, {even}, {odd}, 0x7351;")
    names = ", ".join(f"r{number + 1}" for number in range(registers))
    text = "\n".join(["{", f".reg .b32 {names};", *lines, "}"])
    return Assembly(text, ",".join(["=&r"] * 4 + ["r"] * (2 if two else 6)))


def _table_words(table: tuple[int, ...], order: str) -> list[int]:
    """The table by the index whose bits, most significant first, are those of ``order``: s the sign, and bits 6 and 5."""
    found = []
    for index in range(1 << len(order)):
        bits = {name: index >> (len(order) - 1 - place) & 1 for place, name in enumerate(order)}
        found.append(table[4 * bits["s"] + 2 * bits["6"] + bits.get("5", 0)] & 0xFF)
    return [int.from_bytes(bytes(found[first : first + 4]), "little") for first in range(0, len(found), 4)]


def digit_product(first: bool, upper: bool) -> Assembly:
    """One product of bytes: words of weights, two of x and, unless it is the ``first``, four sums -> the new sums, int32.

    Sums start as the bits of SUM_START.

    Args:
        upper: whether the lower half of the left operand's rows is 0: two words of weights instead of four.
    """
    words = 2 if upper else 4
    weights = "$4, zero, $5, zero" if upper else "$4, $5, $6, $7"
    place = 4 + words
    sums = "start, start, start, start" if first else ", ".join(f"${place + 2 + index}" for index in range(4))
    start = struct.unpack("<I", struct.pack("<f", SUM_START))[0]
    lines = [".reg .b32 start, zero;", f"mov.b32 start, {start:#010x};", "mov.b32 zero, 0;"]
    instruction = "mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32"
    lines.append(f"{instruction} {{$0, $1, $2, $3}}, {{{weights}}}, {{${place}, ${place + 1}}}, {{{sums}}};")
    return Assembly("\n".join(["{", *lines, "}"]), ",".join(["=r"] * 4 + ["r"] * (words + 2 + (0 if first else 4))))


@cache
def digit_words(dtype: str) -> Assembly:
    """Four words of pairs of numbers, and steps per unit of x four times -> their upper digits, two words, and lower, two."""
    lines, start = [], struct.pack(">f", SUM_START + 128).hex()
    for word in range(4):
        if dtype == "bf16":
            lines += [f"shl.b32 e, ${4 + word}, 16;", f"and.b32 o, ${4 + word}, 0xffff0000;"]
            lines += ["mov.b32 even, e;", "mov.b32 odd, o;"]
        else:
            lines += [f"mov.b32 {{low, high}}, ${4 + word};", "cvt.f32.f16 even, low;", "cvt.f32.f16 odd, high;"]
        lines += [f"fma.rn.f32 even, even, $8, 0f{start};", f"fma.rn.f32 odd, odd, $8, 0f{start};"]
        # What is added rounds to integers and makes both digits' bytes those of signed numbers, once a sign is changed.
        lines += ["mov.b32 e, even;", "mov.b32 o, odd;", f"prmt.b32 p{word % 2}, e, o, 0x5410;"]
        if word % 2:
            lines += [f"prmt.b32 ${word // 2}, p0, p1, 0x7531;", "prmt.b32 p0, p0, p1, 0x6420;"]
            lines.append(f"xor.b32 ${2 + word // 2}, p0, 0x80808080;")
    registers = [".reg .b32 e, o, p0, p1;", ".reg .f32 even, odd;"] + [".reg .b16 low, high;"] * (dtype == "f16")
    return Assembly("\n".join(["{", *registers, *lines, "}"]), ",".join(["=&r"] * 4 + ["r"] * 4 + ["f"] * 4))
