"""What the latency model learns, how it generalizes, and that what it stores comes back."""

import copy
import json
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from matgptq_vllm.core.errors import InputError
from serve.latency_model import LatencyModel
from serve.load import StepLoad
from serve.step_cells import MAX_CELLS

PROFILES = ("2", "3", "4", "mix-4.5", "8")
BITS = (2.0, 3.0, 4.0, 4.5, 8.0)
COUNTS = st.dictionaries(st.sampled_from(PROFILES), st.integers(0, 300), max_size=5)
LOADS = st.builds(StepLoad, COUNTS, COUNTS, st.integers(0, 100_000))


def milliseconds(load: StepLoad, speed: float = 1.0) -> float:
    """A truth of the model's own form."""
    total = 1.5 + 2e-4 * load.context_tokens
    for name, bits in zip(PROFILES, BITS, strict=True):
        tokens, prompts = load.tokens.get(name, 0), load.prefill.get(name, 0)
        if tokens or prompts:
            total += 1.25 * bits + 0.1 * tokens + 0.02 * prompts
    return total / speed


def swept(noise: float = 0.05, speed: float = 1.0) -> LatencyModel:
    """A model after a sweep like a server's."""
    randomness = random.Random(0)
    model = LatencyModel(PROFILES, BITS)
    for batch in (1, 8, 32):
        for name in reversed(PROFILES):
            for step in range(8):
                load = StepLoad({name: batch}, {}, batch * (32 + step))
                model.observe([load], milliseconds(load, speed) * randomness.gauss(1, noise))
    return model


def error(model: LatencyModel, speed: float = 1.0) -> float:
    """Mean relative error on mixed batches up to 30 sequences of each profile."""
    randomness = random.Random(1)
    errors = []
    for _ in range(200):
        names = randomness.sample(PROFILES, randomness.choice((1, 1, 2)))
        load = StepLoad({name: randomness.randint(1, 30) for name in names}, {}, randomness.randint(100, 4000))
        errors.append(abs(model.step_ms(load) / milliseconds(load, speed) - 1))
    return sum(errors) / len(errors)


def live(model: LatencyModel, steps: int, largest: int = 30, speed: float = 1.0, outliers: float = 0.0) -> None:
    """Steps of mixed batches, as an engine under load takes them."""
    randomness = random.Random(2)
    for _ in range(steps):
        names = randomness.sample(PROFILES, randomness.choice((1, 1, 2)))
        prefill = {names[0]: randomness.randint(1, 300)} if randomness.random() < 0.3 else {}
        load = StepLoad({name: randomness.randint(1, largest) for name in names}, prefill, randomness.randint(100, 4000))
        factor = 30 if randomness.random() < outliers else randomness.gauss(1, 0.05)
        model.observe([load], milliseconds(load, speed) * factor)


def test_steps_that_compute_prompts_may_take_longer_however_short_these_are() -> None:
    model, randomness = LatencyModel(PROFILES, BITS), random.Random(3)

    def truth(load: StepLoad) -> float:
        return milliseconds(load) + (6.0 if load.prefill else 0.0)

    for _ in range(2000):
        name = randomness.choice(PROFILES)
        prefill = {name: randomness.randint(1, 400)} if randomness.random() < 0.2 else {}
        load = StepLoad({name: randomness.randint(1, 30)}, prefill, randomness.randint(100, 4000))
        model.observe([load], truth(load) * randomness.gauss(1, 0.05))
    assert model.coefficients()["prompts"] == pytest.approx(6.0, rel=0.15)
    for tokens in (1, 60, 300):
        load = StepLoad({"4": 8}, {"4": tokens}, 2000)
        assert model.step_ms(load) == pytest.approx(truth(load), rel=0.1)
        assert model.prompt_ms("4", tokens) == pytest.approx(6.0 + 0.02 * tokens, rel=0.2)
    assert model.prompt_ms("4", 0) == 0


def test_a_new_kind_of_step_that_takes_four_times_as_long_as_predicted_is_believed_after_a_few() -> None:
    model, randomness = LatencyModel(PROFILES, BITS), random.Random(4)

    def observe(prefill: dict[str, int], ms: float, times: int) -> None:
        for _ in range(times):
            model.observe([StepLoad({"8": 8}, prefill, 500)], ms * randomness.gauss(1, 0.02))

    observe({}, 3.5, 600)
    observe({"8": 40}, 300.0, 1)  # a pause of the machine
    observe({"8": 40}, 13.0, 15)
    observe({}, 3.5, 40)
    assert model.step_ms(StepLoad({"8": 8}, {"8": 40}, 500)) == pytest.approx(13.0, rel=0.15)
    assert model.step_ms(StepLoad({"8": 8}, {}, 500)) == pytest.approx(3.5, rel=0.05)


def test_the_last_steps_count_once_the_model_is_fitted_again() -> None:
    model = LatencyModel(PROFILES, BITS)
    model.refit()
    for batch in [1] * 96 + [16] * 8:
        model.observe([StepLoad({"8": batch})], 20.0 + batch)
    assert model.step_ms(StepLoad({"8": 16})) < 25
    model.refit()
    assert model.step_ms(StepLoad({"8": 16})) == pytest.approx(36, rel=0.05)


def test_an_empty_model_predicts_nothing() -> None:
    model = LatencyModel(PROFILES, BITS)
    assert (model.step_ms(StepLoad({"8": 3})), model.num_observations, model.mean_error) == (0.0, 0, None)


def test_a_sweep_of_a_second_is_enough_to_predict_within_a_tenth() -> None:
    assert error(swept()) < 0.10


def test_live_steps_bring_the_error_below_three_percent_despite_outliers() -> None:
    model = swept()
    live(model, 1500, outliers=0.01)
    assert error(model) < 0.03
    assert model.mean_error is not None
    assert model.mean_error < 0.12


def test_a_slower_machine_is_followed() -> None:
    model = swept()
    live(model, 500)
    live(model, 3000, speed=0.7)
    assert error(model, speed=0.7) < 0.06


def test_a_change_of_the_machines_pace_is_one_of_the_profiles_that_do_not_run_too() -> None:
    randomness = random.Random(3)
    model = swept()
    for speed in (1.0, 0.9):
        for _ in range(600):
            load = StepLoad({"8": randomness.randint(5, 12)}, {}, 500)
            model.observe([load], milliseconds(load, speed) * randomness.gauss(1, 0.04))
    for name in ("2", "4"):
        load = StepLoad({name: 8}, {}, 300)
        assert model.step_ms(load) == pytest.approx(milliseconds(load, 0.9), rel=0.04)
        assert model.step_ms(load) > 1.04 * milliseconds(load)


def test_slow_steps_that_come_together_are_told_from_those_that_come_one_by_one() -> None:
    found = {}
    for length in (1, 32):
        randomness = random.Random(3)
        model = swept()
        for step in range(3000):
            if step % length == 0:
                speed = randomness.choice((0.9, 1.1))
            load = StepLoad({"8": randomness.randint(5, 12)}, {}, 500)
            model.observe([load], milliseconds(load, speed))
        found[length] = model.deviations()
    assert found[1][0] == pytest.approx(0.1, abs=0.03)
    assert found[1][5] < 0.03
    assert found[32][4] > 0.06


def test_of_work_that_is_new_no_error_is_remembered() -> None:
    assert swept().deviations() == LatencyModel(PROFILES, BITS).deviations()


def test_an_hour_of_small_batches_does_not_spoil_large_ones() -> None:
    model = swept()
    live(model, 1000)
    live(model, 5000, largest=2)
    assert error(model) < 0.08


def test_narrower_profiles_are_not_thought_slower_after_steps_of_the_widest_alone() -> None:
    model = LatencyModel(PROFILES, BITS)
    for batch in (1, 1, 2, 4, 2):
        model.observe([StepLoad({"8": batch})], milliseconds(StepLoad({"8": batch})))
    predicted = [model.step_ms(StepLoad({name: 4})) for name in PROFILES]
    assert predicted == sorted(predicted)
    assert predicted[0] > 0


def test_a_profile_without_steps_lies_between_its_neighbours() -> None:
    model = LatencyModel(PROFILES, BITS)
    for _ in range(40):
        for name in ("2", "8"):
            for batch in (1, 8):
                model.observe([StepLoad({name: batch})], milliseconds(StepLoad({name: batch})))
    low, middle, high = (model.step_ms(StepLoad({name: 5})) for name in ("2", "4", "8"))
    assert low < middle < high
    assert middle == pytest.approx(milliseconds(StepLoad({"4": 5})), rel=0.1)


def test_what_is_no_measurement_changes_nothing() -> None:
    model = swept()
    before = model.to_json()
    for value in (0.0, -1.0, float("nan"), float("inf")):
        model.observe([StepLoad({"8": 1})], value)
    model.observe([StepLoad()], 5.0)
    assert model.to_json() == before


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(LOADS, st.floats(0.01, 1e5)), max_size=20), LOADS, st.sampled_from(PROFILES))
def test_predictions_are_never_negative_and_grow_with_the_load(steps, load, name) -> None:
    model = LatencyModel(PROFILES, BITS)
    for step, measured in steps:
        model.observe([step], measured)
    predicted = model.step_ms(load)
    assert predicted >= 0
    for more in (
        StepLoad({**load.tokens, name: load.tokens.get(name, 0) + 1}, load.prefill, load.context_tokens),
        StepLoad(load.tokens, {**load.prefill, name: load.prefill.get(name, 0) + 9}, load.context_tokens),
        StepLoad(load.tokens, load.prefill, load.context_tokens + 100),
    ):
        assert model.step_ms(more) >= predicted * (1 - 1e-12)


@settings(max_examples=20, deadline=None)
@given(st.lists(st.tuples(LOADS, st.floats(0.01, 1e5)), max_size=20))
def test_what_is_stored_comes_back(steps) -> None:
    model = LatencyModel(PROFILES, BITS)
    for step, measured in steps:
        model.observe([step], measured)
    document = json.loads(json.dumps(model.to_json()))
    other = LatencyModel(PROFILES, BITS)
    other.restore(document)
    assert other.to_json() == model.to_json()
    assert all(other.step_ms(step) == model.step_ms(step) for step, _ in steps)


def damaged():
    document = swept().to_json()
    yield "no object", []
    yield "other profiles", {**document, "profiles": ["8"]}
    for key in document:
        yield f"no {key}", {name: value for name, value in document.items() if name != key}
        yield f"{key} is text", {**document, key: "x"}
        yield f"{key} is None", {**document, key: None}
    yield "negative", {**document, "coefficients": [-1.0, *document["coefficients"][1:]]}
    yield "infinite", {**document, "coefficients": [float("inf"), *document["coefficients"][1:]]}
    for key, value in (("ms", 0), ("count", 0), ("met", 10**9), ("features", []), ("features", [[99, 1.0]]), ("key", [1])):
        broken = copy.deepcopy(document)
        broken["cells"][0][key] = value
        yield f"cell: {key}", broken


@pytest.mark.parametrize(("document"), [pytest.param(document, id=name) for name, document in damaged()])
def test_a_damaged_store_is_refused_and_the_model_left_as_it_was(document) -> None:
    model = swept()
    before = model.to_json()
    with pytest.raises(InputError, match="measured anew"):
        model.restore(document)
    assert model.to_json() == before


def test_memory_is_bounded() -> None:
    model = LatencyModel(PROFILES, BITS)
    randomness = random.Random(3)
    for _ in range(600):
        tokens = {name: randomness.choice((0, 1, 5, 9, 33, 100)) for name in PROFILES}
        model.observe([StepLoad(tokens, {"8": randomness.choice((0, 10, 100, 1000))})], 5.0)
    assert len(model.to_json()["cells"]) == MAX_CELLS


@pytest.mark.parametrize(
    ("profiles", "bits"), [((), ()), (("8", "8"), (8, 8)), (("8",), (0,)), (("8",), ()), (("8", "2"), (8, 2)), (("8",), ("8",))]
)
def test_profiles_without_sensible_bits_are_refused(profiles, bits) -> None:
    with pytest.raises(InputError, match="give"):
        LatencyModel(profiles, bits)
