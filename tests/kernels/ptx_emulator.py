"""The few PTX instructions that kernels.lanes_ptx uses, in numpy: so that its assembly is tested where there is no GPU."""

import numpy as np
import numpy.typing as npt
import torch

from matgptq_vllm.kernels.lanes_ptx import Assembly

Words = npt.NDArray[np.uint32]

TYPES = {"bf16": torch.bfloat16, "f16": torch.float16}


def emulate(assembly: Assembly, inputs: list[Words], dtype: str) -> list[Words]:
    """Outputs of the assembly for 32-bit ``inputs``, all of one shape. Packed arithmetic rounds once, like the hardware."""
    num_outputs = assembly.constraints.split(",").count("=r")
    shape = inputs[0].shape
    registers = {f"${num_outputs + index}": words for index, words in enumerate(inputs)}

    def value(operand: str) -> Words:
        words = registers[operand] if operand in registers else np.uint32(int(operand, 0))
        return np.broadcast_to(words, shape).astype(np.uint32)

    for line in assembly.text.splitlines():
        instruction, _, rest = line.strip().rstrip(";").partition(" ")
        if instruction in ("{", "}", ".reg"):
            continue
        target, *sources = (operand.strip() for operand in rest.split(","))
        registers[target] = _execute(instruction, sources, value, dtype)
    return [registers[f"${index}"] for index in range(num_outputs)]


def _execute(instruction: str, sources: list[str], value, dtype: str) -> Words:  # type: ignore[no-untyped-def]
    if sources == ["%lanemask_eq"]:
        return value("0x8")
    if sources == ["%lanemask_lt"]:
        return value("0x7")
    name = instruction.split(".")[0]
    if name == "shl":
        return (value(sources[0]).astype(np.uint64) << np.uint64(int(sources[1]))).astype(np.uint32)
    operands = [value(source) for source in (sources[:3] if name == "lop3" else sources)]
    if name == "mov":
        return operands[0]
    if name == "shr":
        return operands[0] >> operands[1]
    if name == "add":
        return operands[0] + operands[1]
    if name == "and":
        return operands[0] & operands[1]
    if name == "or":
        return operands[0] | operands[1]
    if name == "lop3":
        return _lop3(*operands, table=int(sources[3], 0))
    if name == "prmt":
        return _prmt(*operands)
    numbers = [_unpack(words, dtype) for words in operands]
    if name == "fma":
        return _pack(numbers[0] * numbers[1] + numbers[2], dtype)
    if name == "mul":
        return _pack(numbers[0] * numbers[1], dtype)
    if name == "abs":
        return _pack(numbers[0].abs(), dtype)
    assert name == "min", instruction
    return _pack(torch.minimum(*numbers), dtype)


def _lop3(a: Words, b: Words, c: Words, table: int) -> Words:
    result = np.zeros_like(a)
    for case in range(8):
        if table >> case & 1:
            result |= (a if case & 4 else ~a) & (b if case & 2 else ~b) & (c if case & 1 else ~c)
    return result


def _prmt(a: Words, b: Words, selector: Words) -> Words:
    pool = np.stack([word >> np.uint32(8 * byte) & np.uint32(0xFF) for word in (a, b) for byte in range(4)])
    result = np.zeros_like(a)
    for byte in range(4):
        index = selector >> np.uint32(4 * byte) & np.uint32(0xF)
        assert (index < 8).all(), "sign replication is not used"
        result |= np.take_along_axis(pool, index[None].astype(np.int64), 0)[0] << np.uint32(8 * byte)
    return result


def _unpack(words: Words, dtype: str) -> torch.Tensor:
    return torch.from_numpy(words.copy().view(np.int16)).view(TYPES[dtype]).double()


def _pack(numbers: torch.Tensor, dtype: str) -> Words:
    return numbers.to(TYPES[dtype]).view(torch.int16).numpy().copy().view(np.uint32)
