"""Numbers read from a stored document, which anything may have written."""

import math
from collections.abc import Iterable
from typing import TypeGuard


def is_number(value: object) -> TypeGuard[float]:
    """Whether ``value`` is a finite number."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def numbers_of(values: Iterable[object]) -> list[float]:
    """``values`` as floats; ValueError unless all are finite numbers of at least 0."""
    numbers = []
    for value in values:
        if not is_number(value) or value < 0:
            raise ValueError(f"{value!r} is not a number that is at least 0")
        numbers.append(float(value))
    return numbers


def count_of(value: object) -> int:
    """``value``; ValueError unless it is an integer of at least 0."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise ValueError(f"{value!r} is not a count")
    return value
