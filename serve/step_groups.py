"""Steps whose times cannot be told apart, put together.

With asynchronous scheduling the engine launches a step before it looks at what the one before it made. On a GPU, launching a
step with a prompt takes the host longer than the step itself takes the GPU, and the time shows in the step before: a step of an
8B model that only decodes, 3 ms, "takes" 12 ms if a prompt of 16 tokens comes next, and that one 3 ms. Together they are right.
So a step is held back until the next one is known, and goes with it if that one computes a prompt. Of a prompt whose step
before is not known, nothing is known.
"""

from collections.abc import Sequence

from serve.load import StepLoad

MOST = 8
"""Steps of a group: under a flood of prompts every step computes one, and something is to be learned meanwhile."""

Group = tuple[Sequence[StepLoad], float]
"""Steps in a row, and the milliseconds of all of them."""


class StepGroups:
    """Of one engine, whose steps come in order."""

    def __init__(self) -> None:
        self._loads: list[StepLoad] = []
        self._ms = 0.0

    def add(self, load: StepLoad, milliseconds: float) -> Group | None:
        """The next step; returns the steps before it if it does not belong to them."""
        prompt, known = any(load.prefill.values()), bool(self._loads)
        whole = None if prompt and len(self._loads) < MOST else self.end()
        if known or not prompt:
            self._loads.append(load)
            self._ms += milliseconds
        return whole

    def end(self) -> Group | None:
        """What is held back, if anything: the engine had nothing to do after it."""
        whole = (self._loads, self._ms) if self._loads else None
        self.drop()
        return whole

    def drop(self) -> None:
        """The next step is not known, so neither is how long those before it took."""
        self._loads, self._ms = [], 0.0
