"""serve.step_groups: steps whose times show in each other's."""

import itertools
import random

import pytest

from serve.latency_model import LatencyModel
from serve.load import StepLoad
from serve.step_groups import MOST, StepGroups

DECODE, PROMPT = StepLoad({"8": 4}), StepLoad({"8": 4}, {"8": 16})


def test_a_prompt_is_computed_together_with_what_came_before_it() -> None:
    groups = StepGroups()
    steps = [(DECODE, 3.0), (DECODE, 12.0), (PROMPT, 13.0), (PROMPT, 3.0), (DECODE, 3.0)]
    assert [groups.add(*step) for step in steps] == [None, ([DECODE], 3.0), None, None, ([DECODE, PROMPT, PROMPT], 28.0)]
    assert groups.end() == ([DECODE], 3.0)
    assert groups.end() is None


def test_of_a_prompt_nothing_is_known_if_nothing_is_of_the_step_before() -> None:
    groups = StepGroups()
    groups.add(DECODE, 12.0)
    groups.drop()
    assert [groups.add(PROMPT, 3.0), groups.add(PROMPT, 3.0), groups.end()] == [None, None, None]
    assert [groups.add(DECODE, 3.0), groups.end()] == [None, ([DECODE], 3.0)]


def test_a_flood_of_prompts_is_learned_from_meanwhile() -> None:
    groups = StepGroups()
    groups.add(DECODE, 1.0)
    found = [groups.add(PROMPT, 1.0) for _ in range(2 * MOST)]
    assert [len(group[0]) for group in found if group is not None] == [MOST, MOST]


@pytest.mark.parametrize("together", [True, False])
def test_the_cost_of_prompts_is_learned_though_it_shows_in_the_steps_before(together: bool) -> None:
    model, groups, randomness = LatencyModel(["8"], [8.0]), StepGroups(), random.Random(1)

    def decode(load: StepLoad) -> float:
        return (3.0 + 0.05 * load.tokens["8"]) * randomness.gauss(1, 0.03)

    loads = [
        StepLoad({"8": randomness.randint(1, 30)}, {"8": randomness.randint(16, 128)} if randomness.random() < 0.1 else {})
        for _ in range(3000)
    ]
    for load, after in itertools.pairwise(loads):
        ms = decode(load) + (9.0 if after.prefill else 0.0)
        if not together:
            model.observe([load], ms)
        elif (steps := groups.add(load, ms)) is not None:
            model.observe(*steps)
    found = model.coefficients()
    if together:
        assert found["prompts"] + 70 * found["prefill"]["8"] == pytest.approx(9.0, rel=0.1)
        assert model.step_ms(StepLoad({"8": 20})) == pytest.approx(4.0, rel=0.05)
    else:
        # What it would learn from single steps: that prompts are free.
        assert found["prompts"] + 70 * found["prefill"]["8"] < 1.0
