"""serve.following: which requests are told to change, when, and to what."""

import asyncio

import pytest

from serve.budget import Budget
from serve.controller import Controller
from serve.following import MAX_GROUPS, PERIOD_S, Following
from serve.hysteresis import HOLD_S
from serve.latency_model import LatencyModel
from serve.load import Load, StepLoad
from serve.load_tracker import LoadTracker

PROFILES = ("2", "4", "8")
BUDGET = Budget(20)
IDLE = Load()
BUSY = Load({"8": 120}, following={"8": 120})


class Bench:
    """Everything but an engine: a step takes 1 ms per bit and sequence above ten."""

    def __init__(self) -> None:
        self.now = 100.0
        model = LatencyModel(PROFILES, [2, 4, 8])
        for _ in range(20):
            for name in PROFILES:
                for batch in (1, 8, 32):
                    model.observe([StepLoad({name: batch})], int(name) * (1 + 0.05 * batch))
        self.tracker = LoadTracker(clock=lambda: self.now)
        self.controller = Controller(model, PROFILES, clock=lambda: self.now, elastic=True)
        self.following = Following(self.controller, self.tracker, lambda: self.now)

    def start(self, floor=None, allowed=PROFILES, load=IDLE):
        """An ``auto`` request is admitted, some time after the last one."""
        self.now += 2
        profile = self.controller.decide(BUDGET, load, 10, floor, allowed).profile
        group = self.following.group(BUDGET, floor, allowed, profile)
        flight = self.tracker.begin(profile, 10, group.follows)
        self.following.join(group, flight)
        return group, flight


def test_running_requests_step_down_with_their_class_within_their_floor_and_what_they_may_use():
    bench = Bench()
    free, floored, bound = bench.start(), bench.start(floor="4"), bench.start(allowed=("8",))
    assert [flight.profile for _, flight in (free, floored, bound)] == ["8", "8", "8"]
    assert bench.following.changes() == {}
    bench.controller.review(BUDGET, BUSY)
    levels = bench.following.changes()
    assert levels == {free[0].id: "2", floored[0].id: "4"}
    assert free[1].profile == "8"
    bench.following.told(levels)
    assert [flight.profile for _, flight in (free, floored, bound)] == ["2", "4", "8"]
    assert bench.following.changes() == {}


def test_requests_of_one_kind_share_a_group_and_a_new_one_brings_the_older_with_it():
    bench = Bench()
    first, second = bench.start(), bench.start(load=BUSY)
    assert first[0] is second[0]
    assert second[1].profile == "2"
    assert bench.following.changes() == {first[0].id: "2"}


def test_the_load_is_looked_at_while_nothing_arrives():
    bench = Bench()
    group, flight = bench.start()
    bench.controller.review(BUDGET, BUSY)
    bench.following.told(bench.following.changes())
    for _ in range(int(2 * HOLD_S / PERIOD_S) + 1):
        bench.now += PERIOD_S
        bench.following.review()
    assert bench.following.changes() == {group.id: "8"}
    bench.following.leave(group, flight)
    assert bench.following.changes() == {}


def test_groups_without_requests_are_dropped_when_there_are_too_many():
    bench = Bench()
    running = bench.start()
    for index in range(MAX_GROUPS + 5):
        bench.following.group(Budget(20 * 1.03**index), None, PROFILES, "8")
    dropped = bench.following.changes()
    assert dropped
    assert set(dropped.values()) == {None}
    assert running[0].id not in dropped
    bench.following.told(dropped)
    assert bench.following.changes() == {}


def test_a_failing_engine_is_asked_again(caplog: pytest.LogCaptureFixture):
    bench = Bench()
    group, flight = bench.start()
    asked: list = []

    async def send(levels):
        asked.append(levels)
        if len(asked) == 1:
            raise RuntimeError("no answer")

    async def scenario() -> None:
        running = asyncio.create_task(bench.following.run(send))
        bench.controller.review(BUDGET, BUSY)
        bench.following.join(group, flight)
        while flight.profile == "8" and len(asked) < 5:
            await asyncio.sleep(0.02)
        running.cancel()

    asyncio.run(scenario())
    assert asked == [{group.id: "2"}] * 2
    assert "could not be given another precision" in caplog.text
