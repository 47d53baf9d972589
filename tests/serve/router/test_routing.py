"""matgptq route: where a real HAProxy sends requests, with replicas that only answer with their names."""

import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from matgptq_vllm.cli import main
from matgptq_vllm.core.errors import InputError
from serve.router.replicas import parse_replica

from .fake_replica import FakeReplica

Route = Callable[..., httpx.Client]


@pytest.fixture
def wide() -> Iterator[FakeReplica]:
    with FakeReplica("wide", {"2": 2.0, "3": 3.0, "4": 4.0, "6": 6.0, "8": 8.0}, step_ms=20.5) as replica:
        yield replica


@pytest.fixture
def narrow() -> Iterator[FakeReplica]:
    with FakeReplica("narrow", {"2": 2.0, "3": 3.0, "4": 4.0, "mix-3.0": 3.0}, step_ms=5.0) as replica:
        yield replica


@pytest.fixture
def in_flight() -> Iterator[Callable[..., Future[str]]]:
    """``in_flight(client, precision)``: a request that is on its way while the test goes on."""
    with ThreadPoolExecutor(8) as pool:
        yield lambda client, precision: pool.submit(sent, client, {"X-Precision": precision})


def sent(client: httpx.Client, headers: dict[str, str] | None = None, **body: object) -> str:
    """Name of the replica that answered; the status if none did."""
    answer = client.post("/v1/completions", headers=headers, json={"model": "llama", "prompt": "a" * 50_000, **body})
    return answer.text if answer.is_success else str(answer.status_code)


def test_a_precision_goes_to_the_narrowest_replica_that_holds_it(route: Route, wide: FakeReplica, narrow: FakeReplica) -> None:
    client = route(wide=wide.url, narrow=narrow.url)
    assert sent(client, {"X-Precision": "4"}) == "narrow"
    assert sent(client, {"X-Precision": "mix-3.0"}) == "narrow"
    assert sent(client, {"X-Precision": "8"}) == "wide"
    assert sent(client, precision=3) == sent(client, precision="3") == "narrow"
    assert sent(client, vllm_xargs={"precision": "2"}) == "narrow"
    assert sent(client, model="llama@4") == "narrow"
    assert sent(client, model="llama@6") == "wide"
    # The header decides, as in a replica.
    assert sent(client, {"X-Precision": "8"}, precision=3, model="llama@4") == "wide"
    # The widest is first for whatever leaves it open; what nobody holds is refused by the one that offers most.
    assert sent(client) == sent(client, {"X-Precision": "auto"}) == sent(client, {"X-Precision": "5"}) == "wide"
    assert client.get("/v1/precisions").json()["name"] == "wide"


def test_budgets_that_a_replica_cannot_meet_go_to_a_faster_one(route: Route, wide: FakeReplica, narrow: FakeReplica) -> None:
    client = route(wide=wide.url, narrow=narrow.url)
    assert sent(client, {"X-Latency-Budget-Ms": "30"}) == sent(client, {"X-Latency-Budget-Ms": "20.5"}) == "wide"
    assert (
        sent(client, {"X-Latency-Budget-Ms": "12.5"})
        == sent(client, {"X-Precision": "auto", "X-Latency-Budget-Ms": "5"})
        == "narrow"
    )
    # Nobody is as fast as that: the fastest class does what it can, or refuses.
    assert sent(client, {"X-Latency-Budget-Ms": "1"}) == "narrow"


def test_requests_go_where_there_is_room(
    route: Route, wide: FakeReplica, narrow: FakeReplica, in_flight: Callable[..., Future[str]]
) -> None:
    client = route(slots=1, wide=wide.url, narrow=narrow.url)
    wide.hold_before.clear()
    first = in_flight(client, "auto")
    wide.wait_for(1)
    # Auto spills from wide to narrow; a width that only the wide one holds goes to it all the same.
    assert sent(client, {"X-Precision": "auto"}) == sent(client) == "narrow"
    waiting = in_flight(client, "8")
    wide.hold_before.set()
    assert (first.result(10), waiting.result(10)) == ("wide", "wide")
    narrow.hold_before.clear()
    second = in_flight(client, "4")
    narrow.wait_for(3)
    assert sent(client, {"X-Precision": "4"}) == "wide"
    narrow.hold_before.set()
    assert second.result(10) == "narrow"


def test_a_replica_that_dies_takes_only_answers_that_had_begun_with_it(
    route: Route, wide: FakeReplica, narrow: FakeReplica, in_flight: Callable[..., Future[str]]
) -> None:
    client = route(wide=wide.url, narrow=narrow.url)
    narrow.hold_within.clear()
    begun = in_flight(client, "4")
    narrow.wait_for(1)
    narrow.hold_before.clear()
    unanswered = [in_flight(client, "4") for _ in range(3)]
    narrow.wait_for(4)
    narrow.die()
    assert [one.result(20) for one in unanswered] == ["wide"] * 3
    with pytest.raises(httpx.RemoteProtocolError):
        begun.result(20)
    assert [sent(client, {"X-Precision": "4"}) for _ in range(5)] == ["wide"] * 5
    assert sent(client, {"X-Precision": "mix-3.0"}) == "503"


def test_what_waits_on_a_wide_replica_that_dies_goes_on_as_far_as_others_can(
    route: Route, wide: FakeReplica, narrow: FakeReplica, in_flight: Callable[..., Future[str]]
) -> None:
    client = route(wide=wide.url, narrow=narrow.url)
    wide.hold_before.clear()
    left_open, named = in_flight(client, "auto"), in_flight(client, "8")
    wide.wait_for(2)
    wide.die()
    assert left_open.result(20) == "narrow"
    # No other replica holds 8 bits.
    assert named.result(20) in ("502", "503")
    assert sent(client) == "narrow"


def test_a_replica_that_shuts_down_refuses_and_others_answer(route: Route, wide: FakeReplica, narrow: FakeReplica) -> None:
    client = route(wide=wide.url, narrow=narrow.url)
    narrow.draining = True
    deadline = time.monotonic() + 10
    while sent(client, {"X-Precision": "4"}) != "wide":
        # A health check a second tells the router.
        assert time.monotonic() < deadline
    before = narrow.received
    assert [sent(client, {"X-Precision": "4"}) for _ in range(5)] == ["wide"] * 5
    assert narrow.received == before
    wide.draining = True
    assert sent(client, {"X-Precision": "4"}) == "503"


def test_a_refusal_is_taken_to_another_replica_of_the_class(route: Route, wide: FakeReplica) -> None:
    with FakeReplica("twin", wide.precisions, wide.step_ms) as twin:
        client = route(wide=wide.url, twin=twin.url)
        twin.draining = True
        assert [sent(client, {"X-Precision": "8"}) for _ in range(6)] == ["wide"] * 6


@pytest.mark.parametrize("text", ["wide", "=http://a", "a b=http://a", "a=a:8000", "a=https://a", "a=http://a/path"])
def test_replicas_that_are_no_addresses_are_refused(text: str) -> None:
    with pytest.raises(InputError, match="--replica"):
        parse_replica(text)


def test_wrong_input_is_named(tmp_path: Path, wide: FakeReplica, capsys: pytest.CaptureFixture[str]) -> None:
    out = str(tmp_path / "haproxy.cfg")
    for arguments, message in (
        (["--replica", "a=http://127.0.0.1:9"], "replica a: http://127.0.0.1:9 does not answer"),
        (["--replica", f"a={wide.url}", "--replica", f"a={wide.url}"], "the name a is there twice"),
        (["--replica", f"a={wide.url}", "--slots", "0"], "leaves no room"),
        (["--replica", f"a={wide.url}", "--listen", "8080"], "is not [HOST]:PORT"),
    ):
        assert main(["route", *arguments, "--out", out]) == 2
        assert message in capsys.readouterr().err
    assert not Path(out).exists()
