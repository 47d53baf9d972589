"""Step times and load out of vLLM's statistics."""

import logging
from types import SimpleNamespace

import pytest
from vllm.v1.metrics.stats import IterationStats, PrefillStats, SchedulerIterationDetails, SchedulerStats

from serve.step_observer import MAX_STEP_S, EngineLoad, StepObserver


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def observer(clock):
    return StepObserver(clock)


def scheduler(running: int = 0, waiting: int = 0, **values) -> SchedulerStats:
    return SchedulerStats(num_running_reqs=running, num_waiting_reqs=waiting, **values)


def iteration(gaps=(), first=(), tokens: int | None = None, computed: int = 0, cached: int = 0) -> IterationStats:
    stats = IterationStats()
    stats.inter_token_latencies_iter.extend(gaps)
    stats.time_to_first_tokens_iter.extend(first)
    stats.num_generation_tokens = len(gaps) + len(first) if tokens is None else tokens
    if computed or cached:
        stats.prompt_token_stats.update_from_output(
            PrefillStats(num_prompt_tokens=computed + cached, num_computed_tokens=computed, num_cached_tokens=cached)
        )
    return stats


def test_a_step_shows_its_load(observer):
    stats = scheduler(running=3, waiting=2, num_skipped_waiting_reqs=1, kv_cache_usage=0.25)
    record = observer.record(stats, iteration((0.02, 0.02), (0.4,), computed=30, cached=16), 0, kv_cache_tokens=1000)
    assert (record.running, record.waiting, record.continued, record.started) == (3, 3, 2, 1)
    assert (record.generation_tokens, record.prompt_tokens) == (3, 30)
    assert (record.kv_cache_usage, record.context_tokens, record.time_s) == (0.25, 250, 100.0)
    assert observer.load == EngineLoad(running=3, waiting=3, kv_cache_usage=0.25, context_tokens=250)


def test_the_wait_of_sequences_that_continued_is_the_step(observer, clock):
    observer.record(scheduler(3), iteration(first=(0.1,)))
    clock.now += 5.0
    # 5 s late, and one sequence had sat a step out.
    assert observer.record(scheduler(3), iteration((0.0, 0.041, 0.02))).duration_s == 0.02


def test_without_such_a_sequence_the_time_between_records_of_a_busy_engine_is_the_step(observer, clock):
    assert observer.record(scheduler(0, waiting=1), None).duration_s is None
    clock.now += 0.5
    assert observer.record(scheduler(1), iteration(first=(0.5,))).duration_s == 0.5
    clock.now += MAX_STEP_S + 0.1
    assert observer.record(scheduler(1), None).duration_s is None


def test_the_first_step_after_idleness_has_no_duration(observer, clock):
    observer.record(scheduler(1), iteration(first=(0.1,)))
    observer.record(scheduler(0), iteration((0.02,)))
    clock.now += 3.0
    assert observer.record(scheduler(1), iteration(first=(0.1,))).duration_s is None


def test_an_engine_that_clients_abandoned_is_idle_once_the_middleware_says_so(observer, clock):
    observer.record(scheduler(2, waiting=1, kv_cache_usage=0.5), iteration(first=(0.1, 0.1)), 0, 100)
    observer.idle()
    assert observer.load == EngineLoad(context_tokens=0)
    clock.now += 3.0
    assert observer.record(scheduler(1), iteration(first=(0.1,))).duration_s is None


def test_engines_are_timed_apart_and_counted_together(observer, clock):
    observer.record(scheduler(2, kv_cache_usage=0.1), None, 0, 100)
    clock.now += 1.0
    assert observer.record(scheduler(3, waiting=1, kv_cache_usage=0.5), None, 1, 100).duration_s is None
    clock.now += 1.0
    assert observer.record(scheduler(2, kv_cache_usage=0.1), None, 0, 100).duration_s == 2.0
    assert observer.load == EngineLoad(running=5, waiting=1, kv_cache_usage=0.5, context_tokens=60)


def test_a_prompt_in_chunks_makes_its_steps_inexact(observer):
    def step(running, gaps, first=(), computed=0):
        return observer.record(
            scheduler(running), iteration((0.02,) * gaps, first, computed=computed), max_step_tokens=256
        ).exact

    assert step(running=2, gaps=2)
    # The third counts as running as soon as it is scheduled for the next step, which computes its prompt whole.
    assert step(running=3, gaps=2)
    assert step(running=3, gaps=2, first=(0.1,), computed=100)
    # The fourth takes three steps; that it is more than one shows in the second.
    assert step(running=4, gaps=3)
    assert not step(running=4, gaps=3)
    assert not step(running=4, gaps=3)
    assert not step(running=4, gaps=3, first=(0.1,), computed=200)
    assert step(running=4, gaps=4)
    # More than one step can compute, after a single step of silence.
    assert not step(running=5, gaps=4, first=(0.1,), computed=253)
    assert step(running=5, gaps=5)


def test_a_step_that_shows_no_token_is_inexact(observer):
    assert not observer.record(scheduler(1), None).exact


def test_sequences_that_end_in_a_step_do_not_look_like_chunks(observer):
    def ending(running, gaps):
        stats = iteration((0.02,) * gaps)
        stats.finished_requests.append("one")
        return observer.record(scheduler(running), stats).exact

    assert ending(running=3, gaps=4)
    assert ending(running=2, gaps=3)


def test_chunks_are_told_apart_where_the_engine_reports_each_step(observer):
    details = SchedulerIterationDetails(7, 1, 512, 4, 4, 20.0)
    for _ in range(3):
        record = observer.record(scheduler(5, iteration_details=details), iteration((0.02,)), max_step_tokens=256)
        assert (record.prompt_tokens, record.exact) == (512, True)


def test_a_process_without_scheduler_statistics_keeps_what_it_knew(observer):
    assert observer.record(None, None) is None
    assert observer.record(None, iteration((0.02,))).running == 0
    observer.record(scheduler(4, 1), None)
    record = observer.record(None, iteration((0.03,)))
    assert (record.running, record.waiting, record.duration_s) == (4, 1, 0.03)


def test_a_release_with_fewer_attributes_counts_them_as_nothing(observer, clock):
    record = observer.record(SimpleNamespace(num_running_reqs=1), SimpleNamespace(num_prompt_tokens=9))
    assert (record.running, record.waiting, record.kv_cache_usage, record.context_tokens) == (1, 0, 0.0, None)
    assert (record.continued, record.started, record.generation_tokens, record.prompt_tokens) == (0, 0, 0, 9)
    clock.now += 0.25
    assert observer.record(SimpleNamespace(), SimpleNamespace()).duration_s == 0.25


def test_listeners_get_every_step_until_they_stop_and_a_failing_one_stops_nobody(observer, caplog):
    seen = []

    def broken(record):
        raise RuntimeError("broken")

    observer.listen(broken)
    stop = observer.listen(seen.append)
    with caplog.at_level(logging.ERROR):
        records = [observer.record(scheduler(1), None) for _ in range(3)]
    assert seen == records
    assert len(caplog.records) == 1
    stop()
    stop()
    observer.record(scheduler(1), None)
    assert len(seen) == 3
