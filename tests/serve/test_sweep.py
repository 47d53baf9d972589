"""serve.sweep: what is run before a server listens."""

import asyncio

import pytest

from serve.load_tracker import LoadTracker
from serve.sweep import ROUNDS, TOKENS, Sweep


class Engine:
    """Notes what it is asked to compute, and how much was in flight meanwhile."""

    def __init__(self, fails: bool = False) -> None:
        self.tracker = LoadTracker()
        self.asked: list[tuple[str, int, dict[str, int]]] = []
        self.paused: list[bool] = []
        self.fails = fails

    async def generate(self, profile: str, prompt_tokens: int, tokens: int) -> None:
        await asyncio.sleep(0)
        self.paused.append(self.tracker.paused)
        self.asked.append((profile, tokens, dict(self.tracker.load().running)))
        await asyncio.sleep(0)
        if self.fails and len(self.asked) > 2:
            raise RuntimeError("engine")


def test_every_profile_is_run_at_every_batch_size_that_fits_after_an_unobserved_one():
    engine = Engine()
    assert asyncio.run(Sweep(["2", "8"], 4, 60).run(engine.generate, engine.tracker))
    unobserved = [asked[0] for asked, paused in zip(engine.asked, engine.paused, strict=True) if paused]
    assert unobserved == ["8"] * (1 + 4)
    assert engine.paused[:2] == [True, False]
    assert engine.paused[3:7] == [True] * 4
    # Of several sequences, each is two requests, one after the other.
    once = [
        ("8", {"8": 1}), ("2", {"2": 1}), *[("8", {"8": 4})] * 8, *[("2", {"2": 4})] * 8,
    ]  # fmt: skip
    seen = [
        (profile, tokens, running)
        for (profile, tokens, running), paused in zip(engine.asked, engine.paused, strict=True)
        if not paused
    ]
    assert [(profile, running) for profile, _, running in seen] == once * ROUNDS
    assert sum(tokens for _, tokens, _ in seen) == ROUNDS * 2 * (1 + 4) * TOKENS
    assert engine.tracker.load().running == {}


def test_requests_begin_while_others_decode():
    engine = Engine()
    asyncio.run(Sweep(["8"], 4, 60).run(engine.generate, engine.tracker))
    ends = [tokens for (_, tokens, _), paused in zip(engine.asked, engine.paused, strict=True) if not paused][1:5]
    assert len(set(ends)) == len(ends)
    assert engine.tracker.load().running == {}


def test_it_ends_when_its_time_is_over():
    engine = Engine()
    assert not asyncio.run(Sweep(["2", "8"], 4, 0).run(engine.generate, engine.tracker))
    assert len(engine.asked) == 1


def test_a_failure_leaves_nothing_in_flight():
    engine = Engine(fails=True)
    with pytest.raises(RuntimeError):
        asyncio.run(Sweep(["2", "8"], 1, 60).run(engine.generate, engine.tracker))
    assert engine.tracker.load().running == {}
