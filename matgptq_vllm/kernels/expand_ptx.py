"""PTX from pairs of weights in half precision (kernels.lanes_ptx) to a row's values in memory, eight adjacent ones at a time.

Four lanes have a row's part of a piece, each the same pair of every eight columns; they exchange them.

Triton hashes the source of these functions into the key of compiled kernels, so that everything must be in it.
"""

from matgptq_vllm.kernels.lanes_ptx import Assembly

ADJACENT = 8
"""Values that a lane stores at once: 16 bytes."""


def scaled(dtype: str, terms: int) -> Assembly:
    """Four pairs of float16 per term, and a float32 scale -> four pairs of ``dtype``: scale * sum of terms, rounded once.

    Args:
        dtype: "bf16" or "f16", the type's name in PTX.
        terms: 1 or 2 (``lanes_ptx.num_terms``).
    """
    scale = f"${4 + 4 * terms}"
    lines = [".reg .b16 low, high;", ".reg .f32 even, odd, more;"]
    for pair in range(4):
        lines += [f"mov.b32 {{low, high}}, ${4 + pair};", "cvt.f32.f16 even, low;", "cvt.f32.f16 odd, high;"]
        if terms == 2:
            lines += [f"mov.b32 {{low, high}}, ${8 + pair};", "cvt.f32.f16 more, low;", "add.f32 even, even, more;"]
            lines += ["cvt.f32.f16 more, high;", "add.f32 odd, odd, more;"]
        lines += [f"mul.f32 even, even, {scale};", f"mul.f32 odd, odd, {scale};"]
        # The first operand is for the upper half.
        lines.append(f"cvt.rn.{dtype}x2.f32 ${pair}, odd, even;")
    return Assembly("\n".join(["{", *lines, "}"]), ",".join(["=&r"] * 4 + ["r"] * (4 * terms) + ["f"]))


def exchanged() -> Assembly:
    """Four words and the lane's number -> of each of the four lanes that share a row, in their order, the word of this lane's
    place among them. All lanes of a warp take part."""
    lines = [".reg .pred odd, high;", ".reg .b32 place, a, b, c, d;"]
    lines += ["and.b32 place, $8, 1;", "setp.ne.b32 odd, place, 0;", "and.b32 place, $8, 2;", "setp.ne.b32 high, place, 0;"]
    # First each pair of lanes, then both pairs.
    for own, other, word in (("a", "b", 4), ("c", "d", 6)):
        lines += [f"selp.b32 {own}, ${word}, ${word + 1}, odd;", f"shfl.sync.bfly.b32 {own}, {own}, 1, 31, 0xffffffff;"]
        lines += [f"selp.b32 {other}, ${word + 1}, {own}, odd;", f"selp.b32 {own}, {own}, ${word}, odd;"]
    for own, other, word in (("a", "c", 0), ("b", "d", 1)):
        lines += [f"selp.b32 place, {own}, {other}, high;", "shfl.sync.bfly.b32 place, place, 2, 31, 0xffffffff;"]
        lines += [f"selp.b32 ${word}, place, {own}, high;", f"selp.b32 ${word + 2}, {other}, place, high;"]
    return Assembly("\n".join(["{", *lines, "}"]), ",".join(["=&r"] * 4 + ["r"] * 5))


def store() -> Assembly:
    """An address, which is a multiple of 16, whether to write there, and four words -> nothing: the result means nothing."""
    lines = [".reg .pred wanted;", "setp.ne.b32 wanted, $2, 0;", "@wanted st.global.v4.b32 [$1], {$3, $4, $5, $6};"]
    return Assembly("\n".join(["{", *lines, "mov.b32 $0, 0;", "}"]), "=r,l,r,r,r,r,r")
