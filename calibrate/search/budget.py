"""Budgets: a bound on average bits, on bytes of weights, or on predicted decode time. Standard library only."""

import re
from dataclasses import dataclass
from fractions import Fraction

from matgptq_vllm.core.errors import InputError

BYTE_UNITS = {
    "B": 1,
    **{f"{prefix}B": 1000**power for power, prefix in enumerate("KMGT", 1)},
    **{f"{prefix}iB": 1024**power for power, prefix in enumerate("KMGT", 1)},
}
"""Unit of a size to its bytes."""

TIME_UNITS = {"us": 10**6, "ms": 10**9, "s": 10**12}
"""Unit of a time to its picoseconds."""

PICOSECONDS = 10**12
"""In a second."""

QUANTITY = re.compile(r"(\d+(?:\.\d+)?|\.\d+)\s*([A-Za-zµ]*)")

KINDS = {"bits": "bits per weight", "bytes": "bytes of weights", "time": "predicted decode time"}


@dataclass(frozen=True)
class Budget:
    """A bound on what a profile may cost."""

    kind: str
    """bits (average per weight), bytes (of codes and scales), or time (of all quantized layers, for one token)."""

    amount: Fraction
    """Bits per weight, bytes, or picoseconds."""

    unit: str
    """Unit that it was given in; empty for bits."""

    text: str
    """As it was given, without spaces: the default name of the profile has it."""

    def __str__(self) -> str:
        return f"{self.text} {KINDS['bits']}" if self.kind == "bits" else self.text

    def shown(self, amount: Fraction, upwards: bool = False) -> str:
        """An amount of this budget's kind, in its unit, as it can be given on the command line.

        Args:
            upwards: round up in the last digit shown, so that the text is a budget that allows ``amount``.
        """
        scaled = amount / _scale(self.kind, self.unit)
        digits = 4 if self.kind == "bits" else 3
        shifted = scaled * 10**digits
        rounded = -(-shifted.numerator // shifted.denominator) if upwards else round(shifted)
        return f"{rounded / 10**digits:.{digits}f}{self.unit}"


def parse_budgets(text: str) -> tuple[Budget, ...]:
    """``"2.5,3.0"`` -> two budgets; InputError as ``parse_budget``, or if one is there twice."""
    budgets = tuple(parse_budget(item) for item in text.split(","))
    for index, budget in enumerate(budgets):
        if budget.text in (earlier.text for earlier in budgets[:index]):
            raise InputError(f"budget {budget.text} is there twice in {text!r}; name each budget once")
    return budgets


def parse_budget(text: str) -> Budget:
    """A budget as it is written: ``3.0`` bits per weight, ``500MiB`` or ``3.5GB`` of weights, ``2.5ms`` per token.

    Raises:
        InputError: not of these forms, or not above 0.
    """
    number, unit = _quantity(text, f"budget {text!r}")
    if unit in ("", "bits", "bit"):
        kind, unit = "bits", ""
    elif unit in BYTE_UNITS:
        kind = "bytes"
    elif unit.replace("µ", "u") in TIME_UNITS:
        kind, unit = "time", unit.replace("µ", "u")
    else:
        raise InputError(
            f"budget {text!r}: unit {unit!r} is unknown; write bits per weight without a unit (3.0), "
            f"bytes of weights in {', '.join(BYTE_UNITS)}, or time per token in {', '.join(TIME_UNITS)}"
        )
    if number <= 0:
        raise InputError(f"budget {text!r} must be above 0")
    digits = QUANTITY.fullmatch(text.strip())
    assert digits is not None
    return Budget(kind, number * _scale(kind, unit), unit, digits[1] + unit)


def parse_bandwidth(text: str) -> Fraction:
    """``"4.0TB/s"`` -> bytes per second; InputError unless it is a size per second above 0."""
    size, slash, second = text.strip().partition("/")
    message = f"bandwidth {text!r} is not a size per second; write for example 4.0TB/s or 900GB/s"
    number, unit = _quantity(size, f"bandwidth {text!r}")
    if slash != "/" or second != "s" or unit not in BYTE_UNITS or number <= 0:
        raise InputError(message)
    return number * BYTE_UNITS[unit]


def parse_size(text: str) -> int:
    """``"4GiB"`` -> bytes; InputError unless it is a size."""
    number, unit = _quantity(text, f"size {text!r}")
    if unit not in BYTE_UNITS:
        raise InputError(f"size {text!r} needs a unit; write for example 4GiB")
    return int(number * BYTE_UNITS[unit])


def _quantity(text: str, what: str) -> tuple[Fraction, str]:
    match = QUANTITY.fullmatch(text.strip())
    if match is None:
        raise InputError(f"{what} is not a number with a unit; write for example 3.0 (bits per weight), 500MiB or 2.5ms")
    return Fraction(match[1]), match[2]


def _scale(kind: str, unit: str) -> int:
    return {"bits": {"": 1}, "bytes": BYTE_UNITS, "time": TIME_UNITS}[kind][unit]
