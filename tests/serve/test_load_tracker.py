"""serve.load_tracker: requests in flight and the engine's steps, put together."""

from collections.abc import Sequence
from dataclasses import replace

import pytest

from serve.load import Load, StepLoad
from serve.load_tracker import FRESH_S, UNCLEAR_STEPS, LoadTracker
from serve.step_observer import StepRecord

STEP = StepRecord(
    time_s=0.0, engine_index=0, duration_s=0.01, running=2, waiting=0, continued=2, started=0, generation_tokens=2,
    prompt_tokens=0, kv_cache_usage=0.25, context_tokens=None, exact=True,
)  # fmt: skip

PROMPT = replace(STEP, continued=1, started=1, prompt_tokens=10, context_tokens=99)


class Watch:
    """A tracker with a clock that tests turn, and what it told its listener."""

    def __init__(self) -> None:
        self.now = 0.0
        self.idle = 0
        self.steps: list[tuple[Sequence[StepLoad], float]] = []
        self.tracker = LoadTracker(self._idle, lambda: self.now)
        self.tracker.on_step(lambda loads, ms: self.steps.append((loads, ms)))

    def _idle(self) -> None:
        self.idle += 1


def test_requests_in_flight_are_the_load():
    tracker = Watch().tracker
    numbers = [tracker.begin(profile, 10) for profile in ("8", "4", "4")]
    assert tracker.load() == Load({"8": 1, "4": 2}, 0, 0, 30)
    tracker.end(numbers[1])
    tracker.end(numbers[1])
    assert tracker.load() == Load({"8": 1, "4": 1}, 0, 0, 20)


def test_what_the_engine_has_not_started_waits_as_long_as_its_word_is_fresh():
    watch = Watch()
    for profile in ("8", "4", "2"):
        watch.tracker.begin(profile, 10)
    watch.tracker.observe(replace(STEP, waiting=1))
    assert watch.tracker.load() == Load({"8": 1, "4": 1}, 1, 10, 22)
    assert watch.tracker.kv_cache_usage() == 0.25
    watch.now = FRESH_S
    assert watch.tracker.load().waiting == 0


def test_a_step_is_passed_on_with_the_mix_of_profiles():
    watch = Watch()
    for profile in ("8", "4"):
        watch.tracker.begin(profile, 10)
    watch.tracker.observe(STEP)
    watch.tracker.observe(STEP)
    assert watch.steps == [([StepLoad({"8": 1.0, "4": 1.0}, {}, 22)], 10.0)]


def test_prompts_belong_to_the_latest_requests():
    watch = Watch()
    for profile in ("8", "4"):
        watch.tracker.begin(profile, 10)
    for step in (STEP, PROMPT, STEP):
        watch.tracker.observe(step)
    assert watch.steps == [([StepLoad({"8": 1.0, "4": 1.0}, {}, 22), StepLoad({"8": 1.0}, {"4": 10.0}, 99)], 20.0)]


def test_a_step_with_a_prompt_goes_with_the_one_before_it():
    watch = Watch()
    for profile in ("8", "4"):
        watch.tracker.begin(profile, 10)
    for step in (STEP, replace(STEP, duration_s=0.02), PROMPT, STEP):
        watch.tracker.observe(step)
    assert [(len(loads), ms) for loads, ms in watch.steps] == [(1, 10.0), (2, 30.0)]
    assert [bool(load.prefill) for load in watch.steps[1][0]] == [False, True]


def test_a_step_is_passed_on_when_the_engine_had_nothing_to_do_after_it():
    watch = Watch()
    watch.tracker.begin("8", 10)
    watch.tracker.observe(STEP)
    watch.tracker.observe(replace(PROMPT, duration_s=None))
    assert [ms for _, ms in watch.steps] == [10.0]


def test_a_step_before_one_that_says_nothing_is_not_passed_on():
    watch = Watch()
    watch.tracker.begin("8", 10)
    for step in (STEP, replace(PROMPT, exact=False), STEP, replace(STEP, engine_index=1), STEP):
        watch.tracker.observe(step)
    assert [(loads[0].tokens, ms) for loads, ms in watch.steps] == [({"8": 2.0}, 10.0)]


def test_steps_of_unknown_length_or_of_nobody_are_not_passed_on():
    watch = Watch()
    watch.tracker.observe(STEP)
    watch.tracker.begin("8", 1)
    watch.tracker.observe(replace(STEP, duration_s=None))
    watch.tracker.observe(replace(STEP, exact=False))
    watch.tracker.paused = True
    watch.tracker.observe(STEP)
    watch.tracker.paused = False
    # Nothing is held back either.
    watch.tracker.observe(replace(STEP, duration_s=None))
    assert watch.steps == []


def test_the_end_of_the_last_request_is_told():
    watch = Watch()
    first, second = watch.tracker.begin("8", 1), watch.tracker.begin("8", 1)
    watch.tracker.end(first)
    assert watch.idle == 0
    watch.tracker.end(second)
    watch.tracker.end(second)
    assert watch.idle == 1


def test_only_requests_of_the_class_asked_about_follow():
    tracker = Watch().tracker
    for profile, follows in (("8", "a"), ("4", "a"), ("4", "b"), ("2", None)):
        tracker.begin(profile, 10, follows)
    assert tracker.load().following == {}
    assert tracker.load("a").following == {"8": 1, "4": 1}
    assert tracker.load("a").running == {"8": 1, "4": 2, "2": 1}


def test_what_those_that_follow_have_written_and_how_long_it_took_is_told():
    watch = Watch()
    for follows in ("a", "a", None, "a"):
        watch.tracker.begin("8", 10, follows)
    # The last one's prompt is not computed.
    for watch.now in (1.0, 1.1, 1.2):
        watch.tracker.observe(replace(STEP, continued=3, generation_tokens=3))
    assert watch.tracker.load("a").lives == ((2.0, pytest.approx(200.0)), (2.0, pytest.approx(200.0)))
    assert watch.tracker.load().lives == ()


def test_after_a_change_steps_teach_nothing_until_it_has_surely_come():
    watch = Watch()
    flights = [watch.tracker.begin("8", 1, "a"), watch.tracker.begin("8", 1)]
    watch.tracker.change(flights[:1], "2")
    assert watch.tracker.load().running == {"2": 1, "8": 1}
    for _ in range(UNCLEAR_STEPS + 1):
        watch.tracker.observe(STEP)
    assert [load.tokens for (load,), _ in watch.steps] == [{"2": 1.0, "8": 1.0}]
