"""PTX for products in integers: weights of few bits as bytes, x as two bytes per number, on tensor cores that multiply bytes.

Where at most 3 bits decide a weight (``takes_digits``), its level is one of 8 at most, and ``prmt`` looks four of them up in a
table of 8 bytes with one instruction. Levels are integers times a unit (``level_table``): exactly for ``nested`` and
``round``, and for ``curved`` at 2 bits; at 3 within 0.4%.

x is cut into runs of 128 columns, each in units of 1 / 32512 of its greatest: 256 * upper + lower, two signed bytes, the
"digits". So sums of products with either digit are integers below 2^22, and come out as floating point numbers if the sum
starts as the bits of SUM_START.
"""

from collections.abc import Iterable
from functools import cache

import torch

from matgptq_vllm.core.precision import PARENT_WIDTH, WIDTHS
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
        yield from (level_bytes(width, half, rule) for width, rule in cases for half in (0, 1))
        yield from (digit_product(True), digit_product(False), digit_words())

    def level_bytes(self, width: int, half: int, rule: SliceRule) -> Assembly:
        """``level_bytes``, which is the same for all types."""
        return level_bytes(width, half, rule)

    def unit_scale(self, width: int, rule: SliceRule) -> float:
        """What a step of the upper digits times one of the levels is worth, in units of the greatest x and ``FACTOR``."""
        return level_table(width, rule)[0] / FACTOR[rule] / (DIGIT_STEPS // 256) if takes_digits(width, rule) else 1.0

    def digit_product(self, first: bool) -> Assembly:
        """``digit_product``, which is the same for all types."""
        return digit_product(first)

    def digit_words(self) -> Assembly:
        """``digit_words``, which is the same for all types."""
        return digit_words()


def takes_digits(width: int, rule: str) -> bool:
    """Whether products at a width are in integers."""
    # Kernels call it while they are compiled, so Triton reads this source, and allows no call.
    return width < 3 or (width == 3 and rule != "round")


@cache
def level_table(width: int, rule: SliceRule) -> tuple[float, tuple[int, ...]]:
    """(unit, integers): level = unit * integer, as near as bytes allow, per sign (1: negative) and bits 6 and 5 of the magnitude.

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
def level_bytes(width: int, half: int, rule: SliceRule) -> Assembly:
    """Words of as many planes as the width needs -> the left operand of one product of 32 columns: four words of bytes.

    These are, of a lane's 8 columns in kernels.layout: columns 0-3 of output g, of output g + 8, columns 4-7 of g, of g + 8.

    Args:
        half: the piece's number modulo 2.
    """
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

    two = bits_needed(width, rule) == 2
    plane0, plane1 = "$4", "$5"
    for i in (0, 1):
        # Index of a level, in bits 4n on of code (i, n): bit 3 has to be 0.
        if two:
            order = "s6"
            index = op("and.b32", shifted(plane0, -2 + 2 * i), "0x33333333")
        elif (half, i) == (0, 0):
            order = "s65"
            index = op("and.b32", shifted(select(plane0, plane1, 0xCCCCCCCC), -1), "0x77777777")
        else:
            order = "5s6"
            left = {(0, 1): 2, (1, 0): -1, (1, 1): 0}[half, i]
            joined = select(shifted(plane0, -2 + 2 * i), shifted(plane1, left), 0x33333333)
            index = op("and.b32", joined, "0x77777777")
        low, high = _table_words(level_table(width, rule)[1], order)
        even = op("prmt.b32", low, high, index)
        odd = op("prmt.b32", low, high, shifted(index, -16))
        lines.append(f"prmt.b32 ${2 * i}, {even}, {odd}, 0x6240;")
        lines.append(f"prmt.b32 ${2 * i + 1}, {even}, {odd}, 0x7351;")
    names = ", ".join(f"r{number + 1}" for number in range(registers))
    text = "\n".join(["{", f".reg .b32 {names};", *lines, "}"])
    return Assembly(text, ",".join(["=&r"] * 4 + ["r"] * (1 if two else 2)))


def _table_words(table: tuple[int, ...], order: str) -> tuple[str, str]:
    """The table by the index whose bits, most significant first, are those of ``order``: s the sign, and bits 6 and 5."""
    found = []
    for index in range(1 << len(order)):
        bits = {name: index >> (len(order) - 1 - place) & 1 for place, name in enumerate(order)}
        found.append(table[4 * bits["s"] + 2 * bits["6"] + bits.get("5", 0)] & 0xFF)
    low, high = found[:4], found[4:] or found[:4]
    return tuple(f"{int.from_bytes(bytes(half), 'little'):#010x}" for half in (low, high))  # type: ignore[return-value]


def digit_product(first: bool) -> Assembly:
    """One product of bytes: four words of weights, two of x and, unless it is the ``first``, four sums -> the new sums, int32.

    Sums start as the bits of SUM_START.
    """
    start = int.from_bytes(_float_bytes(SUM_START), "little")
    sums = "start, start, start, start" if first else "$10, $11, $12, $13"
    lines = [".reg .b32 start;", f"mov.b32 start, {start:#010x};"] if first else []
    instruction = "mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32"
    lines.append(f"{instruction} {{$0, $1, $2, $3}}, {{$4, $5, $6, $7}}, {{$8, $9}}, {{{sums}}};")
    return Assembly("\n".join(["{", *lines, "}"]), ",".join(["=r"] * 4 + ["r"] * (6 if first else 10)))


def digit_words() -> Assembly:
    """Eight numbers, in steps, plus 128, plus SUM_START, as bits -> their upper digits, two words, and their lower, two."""
    lines = []
    for half in (0, 1):
        first = 4 + 4 * half
        lines += [
            f"prmt.b32 a, ${first}, ${first + 1}, 0x5410;",
            f"prmt.b32 b, ${first + 2}, ${first + 3}, 0x5410;",
            f"prmt.b32 ${half}, a, b, 0x7531;",
            "prmt.b32 a, a, b, 0x6420;",
            f"xor.b32 ${2 + half}, a, 0x80808080;",
        ]
    return Assembly("\n".join(["{", ".reg .b32 a, b;", *lines, "}"]), ",".join(["=&r"] * 4 + ["r"] * 8))


def _float_bytes(value: float) -> bytes:
    return torch.tensor(value, dtype=torch.float32).numpy().tobytes()
