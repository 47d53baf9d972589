"""Writes PTX for 32-bit words, instruction by instruction."""

from collections.abc import Mapping

_SELECT = "0xE4"
"""a where c is 1, b where it is 0"""


class PtxWriter:
    """Collects instructions; registers are named as they come."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self._registers = 0

    def op(self, instruction: str, *operands: object) -> str:
        """An instruction; returns the register that it writes."""
        self._registers += 1
        target = f"r{self._registers}"
        self.lines.append(f"{instruction} {target}, {', '.join(map(str, operands))};")
        return target

    def left(self, register: str, by: int) -> str:
        """The word shifted left, or right if ``by`` is negative."""
        if by == 0:
            return register
        return self.op("shl.b32", register, by) if by > 0 else self.op("shr.u32", register, -by)

    def lop3(self, a: str, b: int | str, c: int | str, table: str) -> str:
        """Any function of three bits; numbers are masks."""
        return self.op("lop3.b32", a, *(f"{value:#010x}" if isinstance(value, int) else value for value in (b, c)), table)

    def select(self, a: str, b: str, mask: int) -> str:
        """``a`` where the mask is 1, else ``b``."""
        return self.lop3(a, b, mask, _SELECT)

    def text(self, constants: Mapping[str, str] | None = None) -> str:
        """All instructions as one block, after what moves values to ``constants``, which are registers, by name."""
        given = constants or {}
        names = [*(f"r{index + 1}" for index in range(self._registers)), *given]
        moves = [f"mov.b32 {name}, {value};" for name, value in given.items()]
        return "\n".join(["{", f".reg .b32 {', '.join(names)};", *moves, *self.lines, "}"])
