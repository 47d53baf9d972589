"""serve.elastic: what is asked of the engine, in which order, and who is refused meanwhile."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from matgptq_vllm.core.errors import UnsupportedError
from serve.control import Control
from serve.elastic import Elastic, WidthChange, parse_change
from serve.errors import RequestError
from serve.exchange import Exchange
from serve.replica import Replica
from serve.selection import Selection
from serve.settings import Settings
from serve.step_observer import StepObserver

from .conftest import REPORT


class Engine:
    """Writes down the calls; planes are read after two reports."""

    def __init__(self, control: Control):
        self.control = control
        self.calls: list[tuple] = []
        self.held = 8
        self.growing_to: int | None = None
        self.reads_left = 2
        self.failure: str | None = None
        self.may_limit = asyncio.Event()
        self.may_limit.set()

    async def reports(self) -> list[dict]:
        if self.growing_to is not None:
            self.reads_left -= 1
            if self.reads_left == 0:
                self.held, self.growing_to = self.growing_to if self.failure is None else self.held, None
        growing = self.growing_to is not None
        return [{**REPORT, "held_max_width": self.held, "growing": growing, "growing_failed": self.failure}]

    async def limit(self, max_width: int, refuses: bool) -> None:
        self.calls.append(("limit", max_width, refuses, self.control.replica.max_width))
        if not refuses:
            await self.may_limit.wait()

    async def shrink(self, max_width: int) -> list[dict]:
        self.calls.append(("shrink", max_width))
        if self.failure is not None:
            raise RuntimeError(self.failure)
        self.held = max_width
        return await self.reports()

    async def grow(self, max_width: int) -> list[dict]:
        self.calls.append(("grow", max_width))
        self.growing_to = max_width
        return await self.reports()


class Site:
    def __init__(self) -> None:
        self.control = Control.of(Replica.from_reports([REPORT], ["tiny"]), Settings(), StepObserver())
        self.engine = Engine(self.control)
        self.changed: list[Any] = []
        self.elastic = Elastic(self.control, self.engine, self.changed.append)
        self.sent: list[dict] = []

    def in_flight(self, profile: str) -> Exchange:
        async def send(message: dict) -> None:
            self.sent.append(message)

        async def receive() -> dict:
            await asyncio.Event().wait()
            return {}

        exchange = Exchange({"headers": []}, receive, send, b"{}", Selection(profile, "header"))
        self.control.in_flight.add(exchange)
        return exchange


def run(scenario: Callable[[Site], Awaitable[None]]) -> Site:
    async def within() -> Site:
        site = Site()
        await asyncio.wait_for(scenario(site), 20)
        return site

    return asyncio.run(within())


def test_new_requests_are_held_before_the_engine_and_planes_go_last() -> None:
    async def scenario(site: Site) -> None:
        wide, narrow = site.in_flight("6"), site.in_flight("4")
        change = asyncio.ensure_future(site.elastic.change(WidthChange(4)))
        await asyncio.sleep(0.1)
        assert site.control.replica.catalogue.profiles == ("2", "3", "4", "mix-3.0")
        assert site.engine.calls == []
        assert site.elastic.to_json()["change"] == {"max_width": 4, "policy": "finish", "waiting_for": 1}
        site.control.in_flight.discard(wide)
        await change
        assert narrow in site.control.in_flight

    site = run(scenario)
    assert site.engine.calls == [("limit", 4, False, 4), ("shrink", 4)]
    assert site.elastic.to_json() == {"available_max_width": 8, "elastic": True, "change": None}
    assert [reports[0]["held_max_width"] for reports in site.changed] == [4]


def test_planes_come_first_and_new_requests_last() -> None:
    async def scenario(site: Site) -> None:
        await site.elastic.change(WidthChange(2))
        site.engine.calls.clear()
        await site.elastic.change(WidthChange(8))
        await site.elastic.change(WidthChange(8))

    site = run(scenario)
    assert site.engine.calls == [("grow", 8), ("limit", 8, False, 2)]
    assert site.control.replica == site.control.all_profiles


def test_the_policy_refuse_tells_clients_and_their_application() -> None:
    async def scenario(site: Site) -> None:
        exchange = site.in_flight("8")
        assert (await exchange.receive())["type"] == "http.request"
        waiting = asyncio.ensure_future(exchange.receive())
        await site.elastic.change(WidthChange(3, "refuse"))
        assert (await waiting)["type"] == "http.disconnect"
        await exchange.send({"type": "http.response.start", "status": 500, "headers": []})
        assert exchange.outcome == 409

    site = run(scenario)
    assert [message["type"] for message in site.sent] == ["http.response.start", "http.response.body"]
    assert site.sent[0]["status"] == 409
    assert b"max width 3; ask again for one of 2, 3, auto" in site.sent[1]["body"]
    assert site.engine.calls[0] == ("limit", 3, True, 3)


def test_a_waiting_change_is_joined_by_the_same_and_excludes_others() -> None:
    async def scenario(site: Site) -> None:
        exchange = site.in_flight("8")
        site.engine.may_limit.clear()
        first = asyncio.ensure_future(site.elastic.change(WidthChange(4)))
        await asyncio.sleep(0.05)
        with pytest.raises(RequestError, match="max width 4 is under way") as refused:
            await site.elastic.change(WidthChange(2))
        assert refused.value.status == 409
        second = asyncio.ensure_future(site.elastic.change(WidthChange(4, "refuse")))
        await asyncio.sleep(0.05)
        assert exchange.outcome == 409
        site.control.in_flight.discard(exchange)
        site.engine.may_limit.set()
        await asyncio.gather(first, second)

    assert run(scenario).engine.calls == [("limit", 4, True, 4), ("limit", 4, False, 4), ("shrink", 4)]


def test_a_failure_leaves_what_was_held() -> None:
    async def scenario(site: Site) -> None:
        site.engine.failure = "driver error"
        with pytest.raises(RuntimeError, match="driver error"):
            await site.elastic.change(WidthChange(4))
        assert site.control.replica.max_width == 8
        assert site.engine.calls[-1] == ("limit", 8, False, 4)
        site.engine.failure = None
        await site.elastic.change(WidthChange(4))
        site.engine.failure = "out of memory"
        with pytest.raises(RequestError, match="out of memory") as failed:
            await site.elastic.change(WidthChange(8))
        assert failed.value.status == 503
        assert site.control.replica.max_width == 4

    run(scenario)


def test_what_cannot_be_had_is_refused() -> None:
    async def scenario(site: Site) -> None:
        narrow = Control.of(site.control.all_profiles.within(4), Settings(), StepObserver())
        with pytest.raises(RequestError, match="started with 4; use 2, 3, 4"):
            await Elastic(narrow, site.engine).change(WidthChange(6))
        with pytest.raises(UnsupportedError, match="cannot be changed: asleep"):
            await Elastic(narrow, site.engine, obstacle="asleep").change(WidthChange(2))

    assert run(scenario).engine.calls == []


@pytest.mark.parametrize(
    "raw", [b"", b"[]", b"{}", b'{"max_width": 5}', b'{"max_width": 4, "policy": 1}', b'{"max_width": 4, "x": 1}']
)
def test_a_change_must_be_well_formed(raw: bytes) -> None:
    with pytest.raises(RequestError):
        parse_change(raw)


def test_a_change_is_read() -> None:
    assert parse_change(b'{"max_width": 4}') == WidthChange(4, "finish")
    assert parse_change(b'{"max_width": 2, "policy": "refuse"}') == WidthChange(2, "refuse")
