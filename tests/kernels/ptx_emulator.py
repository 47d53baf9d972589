"""The few PTX instructions of kernels.lanes_ptx, kernels.digits_ptx and kernels.expand_ptx that compute, in numpy: so that
their assembly is tested where there is no GPU."""

import re

import numpy as np
import numpy.typing as npt
import torch

from matgptq_vllm.kernels.lanes_ptx import Assembly

Words = npt.NDArray[np.uint32]

TYPES = {"bf16": torch.bfloat16, "f16": torch.float16}

OPERAND = re.compile(r"\{[^}]*\}|[^,\s]+")


def emulate(assembly: Assembly, inputs: list[Words], dtype: str) -> list[Words]:
    """Outputs of the assembly for 32-bit ``inputs``, all of one shape, float32 ones as their bits. Arithmetic rounds once, like
    the hardware."""
    num_outputs = sum(constraint.startswith("=") for constraint in assembly.constraints.split(","))
    shape = inputs[0].shape
    registers = {f"${num_outputs + index}": words for index, words in enumerate(inputs)}

    def value(operand: str) -> Words:
        literal = "0x" + operand[2:] if operand.startswith("0f") else operand
        words = registers[operand] if operand in registers else np.uint32(int(literal, 0))
        return np.broadcast_to(words, shape).astype(np.uint32)

    for line in assembly.text.splitlines():
        instruction, _, rest = line.strip().rstrip(";").partition(" ")
        if instruction in ("{", "}", ".reg"):
            continue
        target, *sources = OPERAND.findall(rest)
        if target.startswith("{"):
            low, high = target.strip("{}").split(", ")
            registers[low], registers[high] = value(sources[0]) & np.uint32(0xFFFF), value(sources[0]) >> np.uint32(16)
        else:
            registers[target] = _execute(instruction, sources, value, dtype)
    return [registers[f"${index}"] for index in range(num_outputs)]


def _execute(instruction: str, sources: list[str], value, dtype: str) -> Words:  # type: ignore[no-untyped-def]
    name, *types = instruction.split(".")
    operands = [value(source) for source in (sources[:3] if name == "lop3" else sources)]
    if name == "mov":
        return operands[0]
    if name == "setp":
        return (operands[0] != operands[1]).astype(np.uint32)
    if name == "selp":
        return np.where(operands[2] != 0, operands[0], operands[1])
    if name == "shfl":
        # The last axis are the lanes of a warp.
        return operands[0][..., np.arange(operands[0].shape[-1]) ^ int(operands[1].flat[0])]
    if name == "shl":
        return (operands[0].astype(np.uint64) << operands[1]).astype(np.uint32)
    if name == "shr":
        return operands[0] >> operands[1]
    if name in ("and", "xor"):
        return operands[0] & operands[1] if name == "and" else operands[0] ^ operands[1]
    if name == "prmt":
        return _prmt(*operands)
    if name == "lop3":
        return _lop3(*operands, table=int(sources[3], 0))
    if name == "cvt":
        return _convert(types, operands)
    if types[-1] == "u32":
        assert name == "add", instruction
        return operands[0] + operands[1]
    if types[-1] == "f32":
        if name == "fma":
            first, second, third = (words.view(np.float32).astype(np.float64) for words in operands)
            return (first * second + third).astype(np.float32).view(np.uint32)
        first, second = (words.view(np.float32) for words in operands)
        return {"add": first + second, "mul": first * second}[name].view(np.uint32)
    numbers = [_unpack(words, dtype) for words in operands]
    if name == "fma":
        return _pack(numbers[0] * numbers[1] + numbers[2], dtype)
    assert name == "min", instruction
    return _pack(torch.minimum(*numbers), dtype)


def _convert(types: list[str], operands: list[Words]) -> Words:
    """Half precision to float32, or two float32 to a pair, the first operand in its upper half."""
    if types[0] == "f32":
        return _unpack(operands[0], types[1])[..., ::2].float().numpy().copy().view(np.uint32)
    upper, lower = (torch.from_numpy(words.view(np.float32).copy()) for words in operands)
    return _pack(torch.stack([lower, upper], -1).flatten(-2).double(), types[1].removesuffix("x2"))


def _lop3(a: Words, b: Words, c: Words, table: int) -> Words:
    result = np.zeros_like(a)
    for case in range(8):
        if table >> case & 1:
            result |= (a if case & 4 else ~a) & (b if case & 2 else ~b) & (c if case & 1 else ~c)
    return result


def _prmt(a: Words, b: Words, selector: Words) -> Words:
    result = np.zeros_like(a)
    for place in range(4):
        chosen = selector >> np.uint32(4 * place)
        word = np.where(chosen & np.uint32(4), b, a)
        byte = word >> (chosen & np.uint32(3)) * np.uint32(8) & np.uint32(0xFF)
        copies = (byte >> np.uint32(7)) * np.uint32(0xFF)
        result |= np.where(chosen & np.uint32(8), copies, byte) << np.uint32(8 * place)
    return result


def _unpack(words: Words, dtype: str) -> torch.Tensor:
    return torch.from_numpy(words.copy().view(np.int16)).view(TYPES[dtype]).double()


def _pack(numbers: torch.Tensor, dtype: str) -> Words:
    return numbers.to(TYPES[dtype]).view(torch.int16).numpy().copy().view(np.uint32)
