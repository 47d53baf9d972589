"""PTX for products in integers: weights of few bits as bytes, x as two bytes per number, on tensor cores that multiply bytes.

Where at most 3 bits decide a weight, its level is one of 8 at most, and ``prmt`` looks four of them up in a table of 8 bytes
with one instruction. Of 4 bits, the table has the magnitudes. Bit 3 of an index makes ``prmt`` repeat the sign of the byte that
it found, which is 0: looking up with signs gives the positive levels, and 0 for negative ones, with signs inverted the others.
A single row leaves half of the left operand's rows free for these (``levels_by_sign``).

Levels are integers times a unit (``level_table``): exactly for ``nested`` and ``round``, and for ``curved`` at 2 bits; at 3
bits within 0.17%, at 4 within 0.24%, as root mean square over weights of normal distribution.

x is cut into runs of 128 columns, each in units of 1 / 32512 of its greatest: 256 * upper + lower, two signed bytes, the
"digits". So sums of products with either digit are integers below 2^22, and come out as floating point numbers if the sum
starts as the bits of SUM_START.
"""

import struct
from collections.abc import Iterable
from functools import cache
from itertools import product

import torch

from matgptq_vllm.core.precision import WIDTHS
from matgptq_vllm.core.slicing import SLICE_RULES, SliceRule, levels
from matgptq_vllm.kernels.lanes_ptx import FACTOR, Assembly, LaneCode, bits_needed
from matgptq_vllm.kernels.ptx_writer import PtxWriter

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
        for width, rule in product(WIDTHS, SLICE_RULES):
            if takes_digits(width, rule, False):
                yield from (level_bytes(width, half, rule, flag) for half in (0, 1) for flag in (False, True))
        yield from (levels_by_sign(half) for half in (0, 1))
        yield from (digit_product(first, upper) for first in (False, True) for upper in (False, True))
        yield digit_words(dtype)

    def level_bytes(self, width: int, half: int, rule: SliceRule, paired: bool) -> Assembly:
        """``level_bytes``, which is the same for all types."""
        return level_bytes(width, half, rule, paired)

    def levels_by_sign(self, half: int) -> Assembly:
        """``levels_by_sign``, which is the same for all types."""
        return levels_by_sign(half)

    def level_words(self, width: int, rule: SliceRule) -> tuple[int, ...]:
        """``level_words`` as signed numbers."""
        return tuple((word ^ 1 << 31) - (1 << 31) for word in level_words(width, rule))

    def unit_scale(self, width: int, rule: SliceRule) -> float:
        """What a step of the upper digits times one of the levels is worth, in units of the greatest x and ``FACTOR``."""
        return level_table(width, rule)[0] / FACTOR[rule] / (DIGIT_STEPS // 256) if takes_digits(width, rule, True) else 1.0

    def digit_product(self, first: bool, upper: bool) -> Assembly:
        """``digit_product``, which is the same for all types."""
        return digit_product(first, upper)

    def digit_words(self) -> Assembly:
        """``digit_words`` for this type."""
        return digit_words(self.dtype)


def takes_digits(width: int, rule: str, single: bool) -> bool:
    """Whether products at a width are in integers, of a single row or of more."""
    # Kernels call it while they are compiled, so Triton reads this source, and allows no call.
    return width < 3 or (rule != "round" and (width == 3 or (width == 4 and single)))


@cache
def level_table(width: int, rule: SliceRule) -> tuple[float, tuple[int, ...]]:
    """(unit, integers): level = unit * integer, as near as bytes allow.

    At 4 bits by the magnitude's bits 6 to 4. At fewer per sign (1: negative) and bits 6 and 5; where 2 bits decide, bit 5 makes
    no difference.
    """
    if bits_needed(width, rule) == 4:
        exact = levels(torch.arange(8, dtype=torch.uint8) << 4 | 128, width, rule).double()
    else:
        magnitudes = torch.arange(4, dtype=torch.uint8) << 5
        exact = levels(torch.cat([magnitudes | 128, ~(magnitudes | 128)]), width, rule).double()
    sizes = exact.abs()
    best = (float("inf"), 0.0, torch.zeros(8))
    for greatest in range(1, MAX_BYTE + 1):
        integers = (exact * (greatest / sizes.max())).round()
        unit = ((integers * exact).sum() / integers.square().sum()).item()
        # Most weights lie near 0, so that errors count relative to the level, but not without bound.
        error = ((integers * unit - exact) / (sizes + sizes.mean() / 2)).square().sum().item()
        # Of tables that are as good, the smallest.
        if error < best[0] - 1e-12:
            best = (error, unit, integers)
    return best[1], tuple(int(integer) for integer in best[2])


@cache
def level_words(width: int, rule: SliceRule) -> tuple[int, ...]:
    """The table as ``level_bytes`` and ``levels_by_sign`` need it: four bytes per word, by the indices that come cheapest."""
    orders = {2: ("s6",), 3: ("5s6", "s65"), 4: ("654", "645")}[bits_needed(width, rule)]
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
    bits = bits_needed(width, rule)
    writer, planes = PtxWriter(), [f"${4 + plane}" for plane in range(bits - 1)]
    words = [f"${3 + bits + word}" for word in range(1 if bits == 2 else 4)]
    for i in (0, 1):
        index, place = _index(writer, planes, bits, half, i)
        low, high = words[2 * place : 2 * place + 2] if bits > 2 else words * 2
        index = writer.op("and.b32", index, "0x33333333" if bits == 2 else "0x77777777")
        if paired:
            writer.lines.append(f"prmt.b32 ${2 * i}, {low}, {high}, {index};")
            writer.lines.append(f"prmt.b32 ${2 * i + 1}, {low}, {high}, {writer.left(index, -16)};")
            continue
        even = writer.op("prmt.b32", low, high, index)
        odd = writer.op("prmt.b32", low, high, writer.left(index, -16))
        writer.lines.append(f"prmt.b32 ${2 * i}, {even}, {odd}, 0x6240;")
        writer.lines.append(f"prmt.b32 ${2 * i + 1}, {even}, {odd}, 0x7351;")
    return _assembly(writer, 4, len(planes) + len(words))


def _index(writer: PtxWriter, planes: list[str], bits: int, half: int, i: int) -> tuple[str, int]:
    """Index of the level of code (i, n) in bits 4n on, the other bits being anything, and in which order of the table.

    Of 4 bits, bit 3 is the sign.
    """
    if bits == 2:
        return writer.left(planes[0], -2 + 2 * i), 0
    if bits == 4:
        # Bits 5 and 4 of a code lie side by side, in the order in which their planes have them.
        rest = writer.select(planes[1 + i], planes[2 - i], 0xAAAAAAAA)
        return writer.select(writer.left(planes[0], 2 * i), writer.left(rest, -2 * half), 0xCCCCCCCC), i
    if (half, i) == (0, 0):
        return writer.left(writer.select(planes[0], planes[1], 0xCCCCCCCC), -1), 1
    left = {(0, 1): 2, (1, 0): -1, (1, 1): 0}[half, i]
    return writer.select(writer.left(planes[0], -2 + 2 * i), writer.left(planes[1], left), 0x33333333), 0


@cache
def levels_by_sign(half: int) -> Assembly:
    """Words of three planes -> levels of 4 bits as eight words of bytes: four as those of ``level_bytes`` if ``paired``.

    They come in twos, the upper and the lower half of the left operand's rows: positive levels, with 0 for negative ones, and
    magnitudes of the negative ones, with 0 for others. Operands: these; words of planes; ``level_words``.

    Args:
        half: the piece's number modulo 2.
    """
    writer = PtxWriter()
    for i in (0, 1):
        index, place = _index(writer, ["$8", "$9", "$10"], 4, half, i)
        table = f"${11 + 2 * place}, ${12 + 2 * place}"
        for lower, signed in enumerate((index, writer.op("xor.b32", index, "0x88888888"))):
            writer.lines.append(f"prmt.b32 ${4 * i + lower}, {table}, {signed};")
            writer.lines.append(f"prmt.b32 ${4 * i + 2 + lower}, {table}, {writer.left(signed, -16)};")
    return _assembly(writer, 8, 7)


def _assembly(writer: PtxWriter, num_outputs: int, num_inputs: int) -> Assembly:
    # Outputs are written while inputs are still to be read.
    return Assembly(writer.text(), ",".join(["=&r"] * num_outputs + ["r"] * num_inputs))


def _table_words(table: tuple[int, ...], order: str) -> list[int]:
    """The table by the index whose bits, most significant first, are those of ``order``: s the sign, and bits 6, 5 and 4."""
    names = "654" if "4" in order else "s65"
    found = []
    for index in range(1 << len(order)):
        bits = {name: index >> (len(order) - 1 - place) & 1 for place, name in enumerate(order)}
        found.append(table[sum(bits.get(name, 0) << (2 - place) for place, name in enumerate(names))] & 0xFF)
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
