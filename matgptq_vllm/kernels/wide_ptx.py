"""PTX for the wide product: the weights of two adjacent pieces at once, their terms added up, times their scales."""

import re
from collections.abc import Iterable
from functools import cache

from matgptq_vllm.core.precision import WIDTHS
from matgptq_vllm.core.slicing import SLICE_RULES, SliceRule
from matgptq_vllm.kernels.lanes_ptx import PAIRS, Assembly, PtxCode, num_terms, weights


class WideCode(PtxCode):
    """The assembly of the wide product."""

    __slots__ = ()

    @classmethod
    def assemblies(cls, dtype: str) -> Iterable[Assembly]:
        """All that a kernel may get by the methods of a code."""
        return (scaled_weights(width, rule, flag, dtype) for width in WIDTHS for rule in SLICE_RULES for flag in (False, True))

    def scaled_weights(self, width: int, rule: SliceRule, scaled: bool) -> Assembly:
        """``scaled_weights`` for this type."""
        return scaled_weights(width, rule, scaled, self.dtype)


@cache
def scaled_weights(width: int, rule: SliceRule, scaled: bool, dtype: str) -> Assembly:
    """Words of two pieces -> 16 pairs of weights, the first piece's eight and then the second's.

    Operands: 16 outputs; per plane, the words of both pieces; if ``scaled``, for each piece a word with the scales of outputs g
    and g + 8, bfloat16. Weights are in units of ``lanes_ptx.FACTOR`` levels, times the scale.

    Args:
        dtype: "bf16" or "f16", of the weights.
    """
    terms = num_terms(width, rule)
    text, planes = "", 0
    for half in (0, 1):
        assembly = weights(width, half, rule, dtype)
        outputs = PAIRS * terms
        planes = assembly.constraints.count(",") + 1 - outputs

        def operand(match: re.Match[str], half: int = half, outputs: int = outputs) -> str:
            number = int(match[1])
            if number >= outputs:
                return f"${2 * PAIRS + 2 * (number - outputs) + half}"
            return f"t{number}"

        lines = [f".reg .b32 one, s0, s1, {', '.join(f't{number}' for number in range(outputs))};"]
        lines.append(re.sub(r"\$(\d+)", operand, assembly.text))
        if terms == 2:
            lines.append(f"mov.b32 one, {0x3F803F80 if dtype == 'bf16' else 0x3C003C00:#010x};")
            lines += [f"fma.rn.{dtype}x2 t{n}, t{n}, one, t{PAIRS + n};" for n in range(PAIRS)]
        if scaled:
            word = f"${2 * PAIRS + 2 * planes + half}"
            if dtype == "bf16":
                lines += [f"prmt.b32 s0, {word}, {word}, 0x1010;", f"prmt.b32 s1, {word}, {word}, 0x3232;"]
            else:
                lines += [".reg .b32 w;", ".reg .f32 f;"]
                for name, convert in (("s0", "shl.b32 w, {}, 16;"), ("s1", "and.b32 w, {}, 0xffff0000;")):
                    lines += [convert.format(word), "mov.b32 f, w;", f"cvt.rn.f16x2.f32 {name}, f, f;"]
        for n in range(PAIRS):
            to = f"${PAIRS * half + n}"
            lines.append(f"mul.rn.{dtype}x2 {to}, t{n}, s{n % 2};" if scaled else f"mov.b32 {to}, t{n};")
        text += "\n".join(["{", *lines, "}"]) + "\n"
    return Assembly(text, ",".join(["=r"] * (2 * PAIRS) + ["r"] * (2 * planes + 2 * scaled)))
