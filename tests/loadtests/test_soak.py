"""loadtests.soak: what counts as a leak."""

import random
from types import SimpleNamespace

import pytest

from loadtests.soak import UNKNOWN, Tally, Traffic, growth, leaks

TRAFFIC = Traffic(("2", "8"), tuple(map(str, range(500))), in_flight=4, max_prompt_words=50, max_tokens=20, cancelled=0.5)


def engine(free: int = 10, requests: int = 0, known: int = 0) -> SimpleNamespace:
    """An idle engine that holds what it must not."""
    pool = SimpleNamespace(get_num_free_blocks=lambda: free)
    scheduler = SimpleNamespace(
        kv_cache_manager=SimpleNamespace(block_pool=pool), requests={str(i): None for i in range(requests)}
    )
    worker = SimpleNamespace(precision_state=SimpleNamespace(num_requests=known))
    core = SimpleNamespace(engine_core=SimpleNamespace(engine_core=SimpleNamespace(scheduler=scheduler)))
    return SimpleNamespace(llm_engine=core, generate=lambda *_, **__: [], collective_rpc=lambda method: [method(worker)])


def tally(*host: float, device: float = 0) -> Tally:
    return Tally(seconds=[0.0] * len(host), host_mib=list(host), device_mib=[device] * len(host))


@pytest.mark.parametrize(
    ("llm", "found", "said"),
    [
        (engine(), tally(*range(100, 400)), "host memory grew by 100 MiB; 64 may be chance"),
        (engine(free=7), tally(100.0), "3 KV blocks are not free"),
        (engine(requests=2), tally(100.0), "the scheduler remembers 2 requests"),
        (engine(known=5), tally(100.0), "a worker remembers the precision of 5 requests"),
    ],
)
def test_each_leak_is_found(llm, found: Tally, said: str) -> None:
    assert leaks(llm, lambda **_: None, 10, found, 64) == [said]


def test_an_idle_engine_may_still_know_the_last_request() -> None:
    assert leaks(engine(known=1), lambda **_: None, 10, tally(100.0, 900.0, 900.0, 900.0, 900.0, 910.0), 64) == []


def test_growth_is_that_after_the_first_third() -> None:
    assert growth([0, 500, 900, 1000, 1000, 1000, 1000, 1010, 1005]) == 5
    assert growth([5.0]) == 0


def test_traffic_is_of_every_kind() -> None:
    rng = random.Random(0)
    asked = [TRAFFIC.parameters(rng) for _ in range(1000)]
    precisions = {(given["extra_args"] or {}).get("precision") for given in asked}
    assert precisions == {None, "2", "8", UNKNOWN}
    # vLLM refuses several greedy samples.
    assert {(given["n"], given["temperature"]) for given in asked} == {(1, 0.0), (1, 1.0), (3, 1.0)}
    starts = [TRAFFIC.prompt(rng).split()[0] for _ in range(300)]
    assert starts.count("0") > 50
    assert len(set(starts)) > 50
