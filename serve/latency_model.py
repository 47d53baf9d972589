"""Milliseconds per engine step, as a function of the step's work. Learned from the engine's own steps.

    step_ms = base + sum over profiles p of ( fixed[p] * min(1, work[p]) + decode[p] * tokens[p] + prefill[p] * prompt[p] )
                   + context * context tokens

``work[p]`` is tokens[p] + prompt[p]: the fixed cost is that of reading the profile's weights, which a step pays once. No
coefficient is negative, so more work is never predicted to take less time.

Steps alike (the same profiles, powers of two of decode and of prompt tokens) share one cell, which keeps the mean of its last
steps. The coefficients are fitted to the cells, not to the steps: an hour of small batches does not make the model forget
large ones. What no cell tells of a profile is taken from its neighbours by bits per weight.
"""

import math
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from matgptq_vllm.core.errors import InputError
from serve.load import StepLoad

FORMAT = 1
"""Version of the JSON document."""

CELL_STEPS = 16
"""Steps that a cell's mean remembers: short enough to follow drift, long enough to average noise."""

MAX_CELLS = 128
"""Cells kept; the one that has not been met for longest is dropped."""

STALE_STEPS = 2000
"""Steps after which a cell that was not met counts half; it never counts less than STALE_WEIGHT."""

STALE_WEIGHT = 1 / 16

CLIP = 4.0
"""A step further from its prediction than so many mean errors counts as one that is exactly so far."""

MIN_CLIP = 0.25
"""Relative deviation that is never clipped."""

WARM_UP = 32
"""First steps: fitted to after every second one and never clipped."""

REFIT_STEPS = 32
"""Later the coefficients are fitted after so many steps."""

ERROR_STEPS = 100
"""Steps that the mean error remembers."""

SWEEPS = 10
"""Sweeps of coordinate descent per fit; each fit starts from the last one."""

PRIOR = 0.02
"""Weight of what neighbours tell, in cells."""

TYPICAL_TOKENS = {"fixed": 1.0, "decode": 8.0, "prefill": 256.0}
"""Work at which PRIOR weighs the kinds of cost alike."""

TYPICAL_CONTEXT = 4096.0


@dataclass
class _Cell:
    """Mean of like steps: features and milliseconds, and when it was last met."""

    features: dict[int, float]
    ms: float
    count: int
    met: int


class LatencyModel:
    """Learns how long steps take. Not thread-safe: one event loop owns it."""

    def __init__(self, profiles: Sequence[str], average_bits: Sequence[float]) -> None:
        """A model that knows nothing.

        Args:
            profiles: those that the replica holds, narrow to wide.
            average_bits: bits read per weight of each.

        Raises:
            InputError: no profiles, one occurs twice, or the bits are not as many positive numbers that do not fall.
        """
        if not profiles or len(set(profiles)) != len(profiles):
            raise InputError(f"profiles {list(profiles)!r} cannot be modelled; give at least one, and each once")
        if len(average_bits) != len(profiles) or any(not _is_number(bits) or bits <= 0 for bits in average_bits):
            raise InputError(f"bits per weight {list(average_bits)!r} cannot be used; give a positive number for each profile")
        if any(narrow > wide for narrow, wide in pairwise(average_bits)):
            raise InputError(f"bits per weight {list(average_bits)!r} fall; give the profiles narrow to wide")
        self.profiles = tuple(profiles)
        """Narrow to wide."""

        self._bits = [float(bits) for bits in average_bits]
        self._index = {name: index for index, name in enumerate(self.profiles)}
        count = len(self.profiles)
        self._kinds = {"fixed": 1, "decode": 1 + count, "prefill": 1 + 2 * count}
        self._context = 1 + 3 * count
        self._coefficients = [0.0] * (self._context + 1)
        self._cells: OrderedDict[tuple[int, int, int], _Cell] = OrderedDict()
        self._steps = 0
        self._error = 0.0
        self._bias = 0.0

    @property
    def num_observations(self) -> int:
        """Steps observed, those before a restart included."""
        return self._steps

    @property
    def mean_error(self) -> float | None:
        """Mean of |predicted - measured| / measured over about the last ERROR_STEPS steps; None before the second one."""
        return self._error if self._steps > 1 else None

    @property
    def mean_bias(self) -> float:
        """As ``mean_error`` with its sign: positive if steps take longer than predicted."""
        return self._bias

    def seen(self, profile: str) -> bool:
        """Whether a remembered step computed ``profile``."""
        column = self._kinds["fixed"] + self._index[profile]
        return any(column in cell.features for cell in self._cells.values())

    def step_ms(self, load: StepLoad) -> float:
        """Predicted milliseconds of a step, 0 while no step has been observed. Never negative, and monotone in ``load``.

        Raises:
            KeyError: a profile that the model was not made for.
        """
        return self._predict(self._features(load))

    def prompt_token_ms(self, profile: str) -> float:
        """Predicted milliseconds that one more prompt token adds to a step."""
        return self._coefficients[self._kinds["prefill"] + self._index[profile]]

    def observe(self, load: StepLoad, measured_ms: float) -> None:
        """Learn from one step. Steps without work, and times that are not positive and finite, are ignored.

        Raises:
            KeyError: a profile that the model was not made for.
        """
        if not _is_number(measured_ms) or measured_ms <= 0:
            return
        features = self._features(load)
        if len(features) == 1:
            return
        self._steps += 1
        if self._cells:
            measured_ms = self._judge(self._predict(features), measured_ms)
        key = self._key(load)
        cell = self._cells.get(key)
        if cell is None:
            self._cells[key] = _Cell(features, measured_ms, 1, self._steps)
            if len(self._cells) > MAX_CELLS:
                self._cells.popitem(last=False)
        else:
            cell.count += 1
            rate = 1 / min(cell.count, CELL_STEPS)
            for column in cell.features.keys() | features.keys():
                old = cell.features.get(column, 0.0)
                cell.features[column] = old + rate * (features.get(column, 0.0) - old)
            cell.ms += rate * (measured_ms - cell.ms)
            cell.met = self._steps
            self._cells.move_to_end(key)
        if self._steps % (2 if self._steps <= WARM_UP else REFIT_STEPS) == 0 or self._steps == 1:
            self._fit()

    def coefficients(self) -> dict[str, Any]:
        """Milliseconds: ``base`` per step, ``fixed`` per profile and step, the others per token."""
        tables = {
            kind: {name: self._coefficients[first + index] for index, name in enumerate(self.profiles)}
            for kind, first in self._kinds.items()
        }
        return {"base": self._coefficients[0], **tables, "context": self._coefficients[self._context]}

    def to_json(self) -> dict[str, Any]:
        """Everything that the model knows, for ``restore``."""
        return {
            "format": FORMAT,
            "profiles": list(self.profiles),
            "average_bits": list(self._bits),
            "coefficients": list(self._coefficients),
            "steps": self._steps,
            "mean_error": self._error,
            "mean_bias": self._bias,
            "cells": [
                {
                    "key": list(key),
                    "features": [[column, value] for column, value in sorted(cell.features.items())],
                    "ms": cell.ms,
                    "count": cell.count,
                    "met": cell.met,
                }
                for key, cell in self._cells.items()
            ],
        }

    def restore(self, document: object) -> None:
        """Take up what ``to_json`` of a model of the same profiles described, in place of what this one knows.

        Raises:
            InputError: not such a document; measure anew. The model is left as it was.
        """
        try:
            self._restore(document)
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise InputError(
                f"a stored latency model cannot be used ({type(error).__name__}: {error}); delete it, and it is measured anew"
            ) from error

    def _restore(self, document: Any) -> None:
        expected = {"format": FORMAT, "profiles": list(self.profiles), "average_bits": self._bits}
        found = {key: document[key] for key in expected}
        if found != expected:
            raise ValueError(f"it describes {found}; expected is {expected}")
        coefficients = _numbers(document["coefficients"])
        if len(coefficients) != len(self._coefficients):
            raise ValueError(f"it has {len(coefficients)} coefficients; expected are {len(self._coefficients)}")
        steps = _count(document["steps"])
        (error,) = _numbers([document["mean_error"]])
        bias = document["mean_bias"]
        if not _is_number(bias):
            raise ValueError(f"its mean bias is {bias!r}")
        cells: OrderedDict[tuple[int, int, int], _Cell] = OrderedDict()
        for entry in document["cells"]:
            presence, decode, prefill = (_count(part) for part in entry["key"])
            columns, values = zip(*entry["features"], strict=True)
            features = dict(zip(map(_count, columns), _numbers(values), strict=True))
            (ms,) = _numbers([entry["ms"]])
            cell = _Cell(features, ms, _count(entry["count"]), _count(entry["met"]))
            if features.get(0) != 1 or max(features) >= len(coefficients) or ms <= 0 or not cell.count or cell.met > steps:
                raise ValueError(f"a cell is impossible: {entry}")
            cells[presence, decode, prefill] = cell
        if len(cells) > MAX_CELLS or bool(cells) != bool(steps):
            raise ValueError(f"it has {len(cells)} cells of {steps} steps")
        self._coefficients, self._cells, self._steps, self._error, self._bias = coefficients, cells, steps, error, float(bias)

    def _features(self, load: StepLoad) -> dict[int, float]:
        """Column -> value, zeros left out."""
        features = {0: 1.0}
        fixed, decode, prefill = self._kinds.values()
        for name, tokens in load.tokens.items():
            if tokens > 0:
                index = self._index[name]
                features[decode + index] = float(tokens)
                features[fixed + index] = min(1.0, float(tokens))
        for name, tokens in load.prefill.items():
            if tokens > 0:
                index = self._index[name]
                features[prefill + index] = float(tokens)
                features[fixed + index] = min(1.0, features.get(fixed + index, 0.0) + float(tokens))
        if load.context_tokens > 0:
            features[self._context] = float(load.context_tokens)
        return features

    def _predict(self, features: Mapping[int, float]) -> float:
        return sum(self._coefficients[column] * value for column, value in features.items())

    def _key(self, load: StepLoad) -> tuple[int, int, int]:
        presence = 0
        for name, tokens in (*load.tokens.items(), *load.prefill.items()):
            if tokens > 0:
                presence |= 1 << self._index[name]
        return presence, _magnitude(sum(load.tokens.values())), _magnitude(sum(load.prefill.values()))

    def _judge(self, predicted: float, measured: float) -> float:
        """Score a prediction; ``measured``, moved towards it if it is an outlier."""
        bias = (measured - predicted) / measured
        rate = 1 / min(self._steps - 1, ERROR_STEPS)
        limit = max(MIN_CLIP, CLIP * self._error) * predicted
        # A step that a pause of the machine made a hundred times longer is one error, not a hundred.
        self._error += rate * (min(abs(bias), 1.0) - self._error)
        self._bias += rate * (max(bias, -1.0) - self._bias)
        if self._steps <= WARM_UP or predicted <= 0:
            return measured
        return min(max(measured, predicted - limit), predicted + limit)

    def _fit(self) -> None:
        """Weighted least squares of relative errors over the cells, coefficients >= 0, by coordinate descent."""
        size = len(self._coefficients)
        gram = [[0.0] * size for _ in range(size)]
        target = [0.0] * size
        inverse_square = total = 0.0
        for cell in self._cells.values():
            age = (self._steps - cell.met) / STALE_STEPS
            weight = max(STALE_WEIGHT, 0.5**age) * min(cell.count, CELL_STEPS) / CELL_STEPS / cell.ms**2
            total += weight * cell.ms**2
            inverse_square += weight
            items = list(cell.features.items())
            for column, value in items:
                scaled = weight * value
                row = gram[column]
                for other, factor in items:
                    row[other] += scaled * factor
                target[column] += scaled * cell.ms
        # Milliseconds squared to relative errors squared, and all priors scaled as the observations are.
        prior = PRIOR * min(1.0, total) * inverse_square / total
        coefficients = self._coefficients
        context = self._context
        for _ in range(SWEEPS):
            self._descend(gram, target, 0, prior, 0.0)
            self._descend(gram, target, context, prior * TYPICAL_CONTEXT**2, 0.0)
            for kind, first in self._kinds.items():
                known = [index for index in range(len(self.profiles)) if gram[first + index][first + index] > 0]
                strength = prior * TYPICAL_TOKENS[kind] ** 2
                for index in range(len(self.profiles)):
                    neighbours = self._from_neighbours(kind, index, [other for other in known if other != index])
                    if gram[first + index][first + index] > 0:
                        self._descend(gram, target, first + index, strength, neighbours)
                    else:
                        coefficients[first + index] = neighbours

    def _descend(
        self, gram: Sequence[Sequence[float]], target: Sequence[float], column: int, weight: float, mean: float
    ) -> None:
        row = gram[column]
        coefficients = self._coefficients
        rest = sum(map(float.__mul__, row, coefficients)) - row[column] * coefficients[column]
        coefficients[column] = max(0.0, (target[column] - rest + weight * mean) / (row[column] + weight))

    def _from_neighbours(self, kind: str, index: int, known: Sequence[int]) -> float:
        """What profiles with evidence tell of another one's cost: linear in bits between two of them; outside, the fixed
        cost is taken in proportion to the bits (weights are read) and costs per token are taken as they are."""
        first = self._kinds[kind]
        bits = self._bits
        below = max((other for other in known if other < index), default=None)
        above = min((other for other in known if other > index), default=None)
        if below is None and above is None:
            return 0.0
        if below is not None and above is not None and bits[above] > bits[below]:
            part = (bits[index] - bits[below]) / (bits[above] - bits[below])
            low, high = self._coefficients[first + below], self._coefficients[first + above]
            return low + part * (high - low)
        nearest = above if below is None else below
        assert nearest is not None
        value = self._coefficients[first + nearest]
        return value * bits[index] / bits[nearest] if kind == "fixed" else value


def _magnitude(tokens: float) -> int:
    """0, then a bucket per power of two."""
    return 0 if tokens <= 0 else 1 + max(0, math.ceil(math.log2(max(1.0, tokens))))


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _numbers(values: Iterable[object]) -> list[float]:
    numbers = list(values)
    for value in numbers:
        if not _is_number(value) or value < 0:  # type: ignore[operator]
            raise ValueError(f"{value!r} is not a number that is at least 0")
    return [float(value) for value in numbers]  # type: ignore[arg-type]


def _count(value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise ValueError(f"{value!r} is not a count")
    return value
