"""Milliseconds per engine step, as a function of the step's work. Learned from the engine's own steps.

    step_ms = base + sum over profiles p of ( fixed[p] * min(1, work[p]) + decode[p] * tokens[p] + prefill[p] * prompt[p] )
                   + prompts * min(1, all prompt tokens) + context * context tokens

``work[p]`` is tokens[p] + prompt[p]: the fixed cost is that of reading the profile's weights, which a step pays once.
``prompts`` is what a step takes longer because it computes prompts, however short: other kernels, and no graph of the whole
step. No coefficient is negative, so more work is never predicted to take less time.

Steps alike share a cell, which keeps the mean of its last steps (``serve.step_cells``); the coefficients are fitted to the
cells, not to the steps (``serve.step_fit``). A machine is faster at some times than at others, and what is known of widths that
have not run for a while would be of another time. So cells and coefficients are those of a machine at its mean speed, and all
predictions are multiplied by the present ``pace``: how much longer steps take of late than their cells say.
"""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

from matgptq_vllm.core.errors import InputError
from serve.load import StepLoad
from serve.step_cells import Cell, StepCells
from serve.step_columns import BASE, StepColumns
from serve.step_errors import StepErrors
from serve.step_fit import StepFit
from serve.stored_numbers import count_of, is_number, numbers_of

FORMAT = 3
"""Version of the JSON document."""

CLIP = 4.0
"""A step further from what steps like it took than so many mean errors counts as one that is exactly so far."""

MIN_CLIP = 0.25
"""Relative deviation that is never clipped."""

WARM_UP = 32
"""First steps: fitted to after every second one."""

REFIT_STEPS = 32
"""Later the coefficients are fitted after so many steps."""

ERROR_STEPS = 100
"""Steps that the mean error remembers."""

PACE_STEPS = 24
"""Steps that the pace remembers: fewer than a cell does, so that what all steps have in common is the pace."""

PACE_CELL_STEPS = 8
"""Steps after which a cell tells the pace, and how far predictions are off."""

MAX_PACE_STEP = 2.0
"""A step tells of no greater change of the pace."""


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
        if len(average_bits) != len(profiles) or any(not is_number(bits) or bits <= 0 for bits in average_bits):
            raise InputError(f"bits per weight {list(average_bits)!r} cannot be used; give a positive number for each profile")
        if any(narrow > wide for narrow, wide in pairwise(average_bits)):
            raise InputError(f"bits per weight {list(average_bits)!r} fall; give the profiles narrow to wide")
        self.profiles = tuple(profiles)
        """Narrow to wide."""

        self.bits = tuple(float(bits) for bits in average_bits)
        """Read per weight by each profile."""

        self._columns = StepColumns(self.profiles)
        self._cells = StepCells()
        self._fit = StepFit(self._columns, self.bits)
        self._steps = 0
        self._error = 0.0
        self._bias = 0.0
        self._pace = 1.0
        self._errors = StepErrors()

    @property
    def num_observations(self) -> int:
        """Steps observed, those before a restart included; several that were observed together count once."""
        return self._steps

    @property
    def mean_error(self) -> float | None:
        """Mean of |predicted - measured| / measured over about the last ERROR_STEPS steps; None before the second one."""
        return self._error if self._steps > 1 else None

    @property
    def mean_bias(self) -> float:
        """As ``mean_error`` with its sign: positive if steps take longer than predicted."""
        return self._bias

    def deviations(self) -> tuple[float, ...]:
        """By how much of it the predicted time of 1, 2, 4, ... steps in a row is usually wrong."""
        return self._errors.deviations()

    def seen(self, profile: str) -> bool:
        """Whether a remembered step computed ``profile``."""
        column = self._columns.column("fixed", profile)
        return any(column in cell.features for cell in self._cells)

    def step_ms(self, load: StepLoad) -> float:
        """Predicted milliseconds of a step, 0 while no step has been observed. Never negative, and monotone in ``load``.

        Raises:
            KeyError: a profile that the model was not made for.
        """
        return self._pace * self._predict(self._columns.features(load))

    def prompt_ms(self, profile: str, tokens: float) -> float:
        """Predicted milliseconds that a prompt adds to a step that computed none."""
        coefficients = self._fit.coefficients
        each = coefficients[self._columns.column("prefill", profile)]
        return self._pace * (coefficients[self._columns.prompts] * min(1.0, tokens) + each * tokens)

    def observe(self, loads: Sequence[StepLoad], measured_ms: float) -> None:
        """Learn from steps in a row, as from one of their mean. Steps without work, and times that are not
        positive and finite, are ignored.

        Args:
            loads: one step, or several in a row of which only the time of all is known.
            measured_ms: of all of them.

        Raises:
            KeyError: a profile that the model was not made for.
        """
        if not is_number(measured_ms) or measured_ms <= 0:
            return
        features = self._columns.mean_features(loads)
        if len(features) == 1:
            return
        measured_ms /= len(loads)
        self._steps += 1
        key = self._columns.key(loads)
        cell = self._cells.get(key)
        if len(self._cells):
            predicted = self._pace * self._predict(features)
            self._judge(predicted, measured_ms)
            if cell is not None and cell.known:
                measured_ms = self._clipped(measured_ms, self._expected(cell, features))
            # Of work that is new, the error is that of knowing little, and passes.
            if cell is not None and cell.count >= PACE_CELL_STEPS and predicted > 0:
                for _ in loads:
                    self._errors.add(measured_ms / predicted - 1)
        self._follow_pace(cell, features, measured_ms)
        self._cells.add(key, features, measured_ms / self._pace, self._steps)
        if self._steps % (2 if self._steps <= WARM_UP else REFIT_STEPS) == 0 or self._steps == 1:
            self._fit.fit(self._cells, self._steps)

    def refit(self) -> None:
        """Explain all that is remembered, now: the coefficients are up to REFIT_STEPS steps old."""
        if self._steps:
            self._fit.fit(self._cells, self._steps)

    def coefficients(self) -> dict[str, Any]:
        """Milliseconds: ``base`` per step, ``prompts`` per step with any, ``fixed`` per profile and step, others per token."""
        found = [self._pace * coefficient for coefficient in self._fit.coefficients]
        tables = {
            kind: {name: found[self._columns.column(kind, name)] for name in self.profiles} for kind in self._columns.first
        }
        return {"base": found[BASE], **tables, "context": found[self._columns.context], "prompts": found[self._columns.prompts]}

    def to_json(self) -> dict[str, Any]:
        """Everything that the model knows, for ``restore``; but the pace and its errors, which are of now."""
        return {
            "format": FORMAT,
            "profiles": list(self.profiles),
            "average_bits": list(self.bits),
            "coefficients": list(self._fit.coefficients),
            "steps": self._steps,
            "mean_error": self._error,
            "mean_bias": self._bias,
            "cells": self._cells.to_json(),
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
        expected = {"format": FORMAT, "profiles": list(self.profiles), "average_bits": list(self.bits)}
        found = {key: document[key] for key in expected}
        if found != expected:
            raise ValueError(f"it describes {found}; expected is {expected}")
        coefficients = numbers_of(document["coefficients"])
        if len(coefficients) != len(self._columns):
            raise ValueError(f"it has {len(coefficients)} coefficients; expected are {len(self._columns)}")
        steps = count_of(document["steps"])
        (error,) = numbers_of([document["mean_error"]])
        bias = document["mean_bias"]
        if not is_number(bias):
            raise ValueError(f"its mean bias is {bias!r}")
        cells = StepCells.of(document["cells"], len(self._columns), steps)
        self._fit.coefficients[:] = coefficients
        self._cells, self._steps, self._error, self._bias = cells, steps, error, float(bias)
        self._pace, self._errors = 1.0, StepErrors()

    def _predict(self, features: Mapping[int, float]) -> float:
        coefficients = self._fit.coefficients
        return sum(coefficients[column] * value for column, value in features.items())

    def _follow_pace(self, cell: Cell | None, features: Mapping[int, float], measured_ms: float) -> None:
        """Learn from a step like those of ``cell`` how fast the machine is now."""
        if cell is None or cell.count < PACE_CELL_STEPS:
            return
        ratio = min(max(measured_ms / self._expected(cell, features), 1 / MAX_PACE_STEP), MAX_PACE_STEP)
        self._pace += (ratio - self._pace) / PACE_STEPS

    def _expected(self, cell: Cell, features: Mapping[int, float]) -> float:
        """Milliseconds at the mean speed: the cell tells how long steps like this one take, the fit what their difference in
        work makes of it."""
        mean = self._predict(cell.features)
        return cell.ms * (self._predict(features) / mean if mean > 0 else 1.0)

    def _judge(self, predicted: float, measured: float) -> None:
        """Score a prediction."""
        bias = (measured - predicted) / measured
        rate = 1 / min(self._steps - 1, ERROR_STEPS)
        # A step that a pause of the machine made a hundred times longer is one error, not a hundred.
        self._error += rate * (min(abs(bias), 1.0) - self._error)
        self._bias += rate * (max(bias, -1.0) - self._bias)

    def _clipped(self, measured: float, expected: float) -> float:
        """``measured``, moved towards what steps alike took (``expected``, at the mean speed) if it is an outlier."""
        center = self._pace * expected
        limit = max(MIN_CLIP, CLIP * self._error) * center
        return min(max(measured, center - limit), center + limit)
