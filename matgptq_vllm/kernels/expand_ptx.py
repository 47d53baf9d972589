"""PTX from pairs of weights in half precision (kernels.lanes_ptx) to a row's values in memory, eight adjacent ones at a time.

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


def store() -> Assembly:
    """An address, which is a multiple of 16, whether to write there, and four words -> nothing: the result means nothing."""
    lines = [".reg .pred wanted;", "setp.ne.b32 wanted, $2, 0;", "@wanted st.global.v4.b32 [$1], {$3, $4, $5, $6};"]
    return Assembly("\n".join(["{", *lines, "mov.b32 $0, 0;", "}"]), "=r,l,r,r,r,r,r")
