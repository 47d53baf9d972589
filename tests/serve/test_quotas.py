"""Quotas under an injected clock."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serve.quotas import CONCURRENCY_RETRY_S, REFUSALS, Quotas, TokenBucket
from serve.tenants import Tenant, Tenants

LIMITS = st.integers(1, 1000)
STEPS = st.floats(0, 90, allow_nan=False) | st.sampled_from([0.0, 1e-9, 60.0])


class Clock:
    def __init__(self, now: float = 1_000_000.0):
        self.now = now

    def __call__(self) -> float:
        return self.now


class Bench:
    """Quotas of one tenant, and the time."""

    def __init__(self, **limits: int):
        self.clock = Clock()
        self.tenant = Tenant("a", **limits)
        self.tenants = Tenants([self.tenant], {})
        self.quotas = Quotas(lambda: self.tenants, self.clock)

    def admit(self, tokens: int = 0):
        return self.quotas.admit(self.tenant, tokens)


def test_a_tenant_without_limits_is_always_admitted():
    bench = Bench()
    admissions = [bench.admit(10**12) for _ in range(1000)]
    assert all(admission.allowed and admission.ticket is not None for admission in admissions)


def test_a_minutes_worth_of_requests_at_once_then_evenly():
    bench = Bench(requests_per_minute=6)
    assert [bench.admit().allowed for _ in range(7)] == [True] * 6 + [False]
    bench.clock.now += 9.9
    assert not bench.admit().allowed
    bench.clock.now += 0.2
    assert [bench.admit().allowed for _ in range(2)] == [True, False]


def test_a_refusal_says_which_limit_and_how_long():
    bench = Bench(requests_per_minute=6)
    for _ in range(6):
        bench.admit()
    refused = bench.admit()
    assert (refused.allowed, refused.ticket, refused.reason) == (False, None, "requests")
    assert refused.retry_after_s == pytest.approx(10, abs=0.01)
    assert refused.message == "this API key's 6 requests per minute are used up; retry in 11 s"


def test_a_refused_request_uses_up_nothing():
    bench = Bench(requests_per_minute=2, tokens_per_minute=100)
    assert bench.admit(90).allowed
    for _ in range(50):
        assert bench.admit(20).reason == "tokens"
    assert bench.admit(10).allowed
    assert bench.admit(0).reason == "requests"


def test_the_limit_that_takes_longest_is_the_one_that_is_told():
    bench = Bench(requests_per_minute=60, tokens_per_minute=100, max_concurrent=60)
    for _ in range(60):
        bench.admit(1)
    refused = bench.admit(100)
    assert refused.reason == "tokens"
    assert refused.retry_after_s == pytest.approx(36, abs=0.01)
    assert bench.admit(40).reason in ("requests", "concurrency")


def test_what_can_never_be_admitted_is_told_apart():
    bench = Bench(tokens_per_minute=100)
    for tokens in (101, 10**400):
        refused = bench.admit(tokens)
        assert (refused.allowed, refused.reason, refused.retry_after_s) == (False, "too_large", None)
        assert "100 per minute; lower max_tokens" in refused.message
    assert bench.admit(100).allowed


def test_unused_tokens_come_back_when_the_request_ends():
    bench = Bench(tokens_per_minute=100)
    ticket = bench.admit(100).ticket
    assert bench.admit(30).reason == "tokens"
    bench.quotas.settle(ticket, 70)
    assert bench.admit(30).allowed
    assert bench.admit(1).reason == "tokens"


def test_tokens_beyond_the_reservation_are_a_debt_that_is_paid_first():
    bench = Bench(tokens_per_minute=60)
    bench.quotas.settle(bench.admit(10).ticket, 180)
    refused = bench.admit(0)
    assert refused.reason == "tokens"
    assert refused.retry_after_s == pytest.approx(120, abs=0.01)
    bench.clock.now += refused.retry_after_s
    assert bench.admit(0).allowed
    assert bench.admit(1).reason == "tokens"


def test_a_request_whose_use_is_unknown_pays_what_it_reserved():
    bench = Bench(tokens_per_minute=100)
    bench.quotas.settle(bench.admit(60).ticket, None)
    assert bench.admit(41).reason == "tokens"
    assert bench.admit(40).allowed


def test_settling_twice_changes_nothing():
    bench = Bench(tokens_per_minute=100, max_concurrent=1)
    ticket = bench.admit(100).ticket
    bench.quotas.settle(ticket, 50)
    bench.quotas.settle(ticket, 0)
    assert bench.admit(51).reason == "tokens"
    assert bench.admit(50).allowed
    assert bench.admit(0).reason == "concurrency"


def test_negative_numbers_create_no_tokens():
    bench = Bench(tokens_per_minute=100)
    ticket = bench.admit(-1000).ticket
    assert bench.admit(100).allowed
    bench.quotas.settle(ticket, -1000)
    assert bench.admit(1).reason == "tokens"


def test_only_so_many_requests_are_in_flight_at_once():
    bench = Bench(max_concurrent=2)
    first, second = bench.admit().ticket, bench.admit().ticket
    refused = bench.admit()
    assert (refused.reason, refused.retry_after_s) == ("concurrency", CONCURRENCY_RETRY_S)
    assert refused.message == "this API key has 2 requests in flight, and may have 2; retry in 1 s"
    bench.quotas.settle(first, 0)
    assert bench.admit().allowed
    bench.quotas.settle(second, 0)
    assert bench.admit().allowed
    assert not bench.admit().allowed


def test_tenants_do_not_share_an_account():
    bench = Bench(requests_per_minute=1)
    other = Tenant("b", requests_per_minute=1)
    bench.tenants = Tenants([bench.tenant, other], {})
    assert [bench.admit().allowed, bench.quotas.admit(other, 0).allowed] == [True, True]
    assert [bench.admit().allowed, bench.quotas.admit(other, 0).allowed] == [False, False]


def test_what_was_used_survives_a_reload_and_a_change_of_the_limit():
    bench = Bench(requests_per_minute=60)
    for _ in range(60):
        bench.admit()
    bench.tenants = Tenants([bench.tenant], {})
    assert bench.admit().reason == "requests"
    bench.tenant = Tenant("a", requests_per_minute=6000)
    bench.tenants = Tenants([bench.tenant], {})
    assert bench.admit().retry_after_s == pytest.approx(0.01, abs=0.002)
    bench.tenant = Tenant("a")
    bench.tenants = Tenants([bench.tenant], {})
    assert bench.admit().allowed


def test_a_change_of_limit_keeps_the_time_until_the_bucket_is_full():
    bucket = TokenBucket(100, 0.0)
    bucket.charge(75, 0.0)
    bucket.resize(8, 0.0)
    assert bucket.level(0.0) == pytest.approx(2)
    assert bucket.wait_s(8, 0.0) == pytest.approx(45, abs=0.01)


def test_a_limit_that_appears_while_a_request_runs_gets_nothing_back_from_it():
    bench = Bench()
    ticket = bench.admit(1000).ticket
    bench.tenant = Tenant("a", tokens_per_minute=10)
    bench.tenants = Tenants([bench.tenant], {})
    assert bench.admit(10).allowed
    bench.quotas.settle(ticket, 0)
    assert bench.admit(1).reason == "tokens"


def test_accounts_of_tenants_that_are_gone_are_dropped():
    bench = Bench()
    many = [Tenant(f"t{index}", requests_per_minute=1) for index in range(100)]
    bench.tenants = Tenants(many, {})
    tickets = [bench.quotas.admit(tenant, 5).ticket for tenant in many]
    assert len(bench.quotas) == 100
    bench.tenants = Tenants(many[:2], {})
    assert bench.quotas.admit(many[0], 5).reason == "requests"
    assert len(bench.quotas) == 1 + 1
    for ticket in tickets:
        bench.quotas.settle(ticket, 5)
    assert len(bench.quotas) == 2


def test_a_clock_that_stands_still_or_runs_backwards_creates_no_tokens():
    bench = Bench(requests_per_minute=1)
    assert bench.admit().allowed
    for step in (0, -100, 50, 50):
        bench.clock.now += step
        assert not bench.admit().allowed
    bench.clock.now += 61
    assert bench.admit().allowed


@given(st.integers(1, 20), st.lists(STEPS, max_size=12))
def test_never_more_requests_than_rate_times_time_and_one_burst(limit, steps):
    bench = Bench(requests_per_minute=limit)
    times = []
    for step in steps:
        bench.clock.now += step
        while bench.admit().allowed:
            times.append(bench.clock.now)
    for first, start in enumerate(times):
        for last in range(first, len(times)):
            assert last - first + 1 <= limit * (1 + (times[last] - start) / 60) + 1e-6


@given(
    limit=LIMITS,
    requests=st.lists(st.tuples(STEPS, st.integers(0, 1200), st.integers(0, 3000) | st.none(), st.booleans()), max_size=60),
)
def test_never_more_tokens_than_rate_times_time_and_one_burst(limit, requests):
    # At every admission: what ended requests really used, and what open ones reserved, this one included.
    bench = Bench(tokens_per_minute=limit)
    start, charged, running = bench.clock.now, 0, []
    for step, estimate, used, ends in requests:
        bench.clock.now += step
        admission = bench.admit(estimate)
        assert admission.allowed == (admission.ticket is not None)
        if admission.allowed:
            charged += estimate
            running.append((admission.ticket, estimate, used))
            assert charged <= limit * (1 + (bench.clock.now - start) / 60) + 1e-6
        else:
            assert admission.reason in REFUSALS
            assert (admission.retry_after_s is None) == (estimate > limit)
        if ends and running:
            ticket, reserved, really = running.pop(0)
            bench.quotas.settle(ticket, really)
            charged += 0 if really is None else really - reserved


@given(
    limit=LIMITS,
    now=st.floats(0, 2e9, allow_nan=False),
    charges=st.lists(st.tuples(STEPS, st.integers(-5000, 5000)), max_size=30),
)
def test_a_level_is_finite_and_between_the_debt_and_full(limit, now, charges):
    bucket = TokenBucket(limit, now)
    debt = 0
    for step, amount in charges:
        now += step
        bucket.charge(amount, now)
        debt += max(0, amount)
        level = bucket.level(now)
        assert math.isfinite(level)
        assert -debt - 1e-6 <= level <= limit


@given(
    limits=st.fixed_dictionaries({"requests_per_minute": st.integers(1, 10**9), "tokens_per_minute": st.integers(1, 10**9)}),
    now=st.floats(0, 2e9, allow_nan=False),
    requests=st.lists(st.tuples(STEPS, st.floats(0, 1, allow_nan=False), st.integers(0, 10**10)), max_size=12),
)
def test_a_request_that_waits_as_long_as_it_was_told_is_admitted(limits, now, requests):
    bench = Bench(**limits)
    bench.clock.now = now
    for step, share, used in requests:
        bench.clock.now += step
        tokens = int(share * limits["tokens_per_minute"])
        admission = bench.admit(tokens)
        if not admission.allowed:
            bench.clock.now += admission.retry_after_s
            admission = bench.admit(tokens)
            assert admission.allowed
        bench.quotas.settle(admission.ticket, used)


@given(old=LIMITS, new=LIMITS, used=st.integers(0, 2000))
def test_resizing_there_and_back_changes_nothing(old, new, used):
    bucket = TokenBucket(old, 0.0)
    bucket.charge(used, 0.0)
    before = bucket.level(0.0)
    bucket.resize(new, 0.0)
    assert bucket.level(0.0) <= new
    bucket.resize(old, 0.0)
    assert bucket.level(0.0) == pytest.approx(before, rel=1e-9, abs=1e-9)
