"""Changing the max width of a running replica: ``POST /v1/precisions``.

Narrower: new requests for wider profiles are refused at once and ``auto`` chooses among the rest; those in flight finish, or
are ended with an error, by policy; then the scheduler is held to the limit, for what does not come through here; then the
planes go.
Wider: the planes are read while the engine runs on; then the limit is lifted, in the scheduler before it is lifted here.
"""

import asyncio
import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from matgptq_vllm.core.errors import MatGPTQError, UnsupportedError
from matgptq_vllm.core.precision import WIDTHS, check_width
from serve.control import Control
from serve.errors import RequestError
from serve.replica import Report

POLICIES = ("finish", "refuse")

POLL_S = 0.02

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class WidthChange:
    """What an operator asks for."""

    max_width: int
    policy: str = POLICIES[0]
    """What becomes of requests in flight that are wider: they finish, or are refused."""


def parse_change(raw: bytes) -> WidthChange:
    """The change in a JSON object with ``max_width``, and ``policy`` if it is not `finish`; RequestError 400 otherwise."""
    try:
        document = json.loads(raw)
    except (ValueError, RecursionError):
        document = None
    if not isinstance(document, dict) or "max_width" not in document or not set(document) <= {"max_width", "policy"}:
        raise RequestError("the body must be a JSON object with max_width, and policy if wanted", "body")
    change = WidthChange(document["max_width"], document.get("policy", POLICIES[0]))
    try:
        check_width(change.max_width)
    except MatGPTQError as error:
        raise RequestError(f"max_width: {error}", "body", param="max_width") from None
    if change.policy not in POLICIES:
        raise RequestError(f"policy must be {' or '.join(POLICIES)}", "body", param="policy")
    return change


class Engine(Protocol):
    """See ``serve.width_limit``."""

    async def reports(self) -> Sequence[Report]: ...
    async def limit(self, max_width: int, refuses: bool) -> None: ...
    async def shrink(self, max_width: int) -> Sequence[Report]: ...
    async def grow(self, max_width: int) -> Sequence[Report]: ...


class Elastic:
    """Changes the max width, one change at a time. For one event loop.

    Args:
        control: of the replica.
        engine: the replica's.
        on_change: called with fresh reports of the workers when a change is done.
        obstacle: why this server cannot change the width, None if it can.
    """

    def __init__(
        self,
        control: Control,
        engine: Engine,
        on_change: Callable[[Sequence[Report]], None] = lambda _: None,
        obstacle: str | None = None,
    ):
        self._control = control
        self._engine = engine
        self._on_change = on_change
        self._obstacle = obstacle
        self._change: WidthChange | None = None
        self._task: asyncio.Task[None] | None = None

    async def change(self, change: WidthChange) -> None:
        """Make the change; returns when it holds. A caller who goes away does not stop it.

        Raises:
            RequestError: 400, the replica was not started with that width; 409, another change is under way; 503, the planes
                cannot be read again now.
            UnsupportedError: this replica cannot.
        """
        if self._obstacle is not None:
            raise UnsupportedError(f"the max width of this replica cannot be changed: {self._obstacle}")
        available = self._control.all_profiles.max_width
        if change.max_width > available:
            offered = ", ".join(str(width) for width in WIDTHS if width <= available)
            raise RequestError(
                f"max_width {change.max_width} is not available: the replica was started with {available}; use {offered}",
                "body",
                param="max_width",
            )
        if self._task is not None and not self._task.done():
            await self._join(change)
        else:
            self._task = asyncio.ensure_future(self._run(change))
        await asyncio.shield(self._task)

    def to_json(self) -> dict[str, Any]:
        """What can be held, and what is under way."""
        under_way = self._change
        return {
            "available_max_width": self._control.all_profiles.max_width,
            "elastic": self._obstacle is None,
            "change": None
            if under_way is None
            else {
                "max_width": under_way.max_width,
                "policy": under_way.policy,
                "waiting_for": len(self._control.wider_in_flight(under_way.max_width)),
            },
        }

    async def _join(self, change: WidthChange) -> None:
        """Let ``change`` be the one that is under way, if that leads to the same width; RequestError 409 otherwise."""
        under_way = self._change
        if under_way is None:
            return
        if change.max_width != under_way.max_width:
            raise RequestError(
                f"a change to max width {under_way.max_width} is under way; try again when it is done, or post the same "
                "change with policy refuse to end the requests that it waits for",
                "body",
                status=409,
            )
        narrows = self._control.replica.max_width == under_way.max_width
        if narrows and change.policy == "refuse":
            await self._refuse(change.max_width)
            await self._engine.limit(change.max_width, refuses=True)

    async def _run(self, change: WidthChange) -> None:
        held = self._control.replica.max_width
        if change.max_width == held:
            return
        self._change = change
        try:
            reports = await (self._narrow(change, held) if change.max_width < held else self._widen(change.max_width))
        finally:
            self._change = None
        self._on_change(reports)
        _logger.info("max width is now %d", change.max_width)

    async def _narrow(self, change: WidthChange, held: int) -> Sequence[Report]:
        self._control.hold(change.max_width)
        try:
            if change.policy == "refuse":
                await self._refuse(change.max_width)
            else:
                while self._control.wider_in_flight(change.max_width):
                    await asyncio.sleep(POLL_S)
            await self._engine.limit(change.max_width, refuses=change.policy == "refuse")
            return await self._engine.shrink(change.max_width)
        except BaseException:
            # Whether or not planes are gone: what is not dropped in the workers stays unused, never the other way round.
            reports = await self._engine.reports()
            if all(report["held_max_width"] == held for report in reports):
                await self._engine.limit(held, refuses=False)
                self._control.hold(held)
            raise

    async def _widen(self, max_width: int) -> Sequence[Report]:
        reports = await self._engine.grow(max_width)
        while any(report["growing"] for report in reports):
            await asyncio.sleep(POLL_S)
            reports = await self._engine.reports()
        failures = [report["growing_failed"] for report in reports if report["held_max_width"] != max_width]
        if failures:
            raise RequestError(f"the planes could not be read again: {failures[0]}", "body", status=503)
        await self._engine.limit(max_width, refuses=False)
        self._control.hold(max_width)
        return reports

    async def _refuse(self, max_width: int) -> None:
        for exchange in self._control.wider_in_flight(max_width):
            await exchange.refuse(
                RequestError(
                    f"the request was ended: this replica now holds max width {max_width}; ask again for one of "
                    f"{', '.join(self._control.replica.catalogue.profiles)}, auto",
                    "precision",
                    status=409,
                )
            )
