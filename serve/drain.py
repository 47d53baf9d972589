"""The graceful end of a server: after SIGTERM, answers under way are finished and new generation requests are refused.

vLLM itself ends at once on SIGTERM and SIGINT alike. Here SIGTERM waits first, and then raises SIGINT, so that the rest
is vLLM's own. SIGINT (Ctrl-C), or a second SIGTERM, ends at once.
"""

import asyncio
import logging
import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from serve.errors import RequestError

RETRY_AFTER_S = 1
"""A refused request need not wait: another replica takes it now, and this one never will."""

_logger = logging.getLogger(__name__)


def end_now() -> None:
    """What vLLM takes for Ctrl-C."""
    os.kill(os.getpid(), signal.SIGINT)


class Drain:
    """Counts the answers under way. For one event loop, not for threads.

    Args:
        seconds: longest time to wait for them; 0: SIGTERM is left to vLLM.
        end: ends the server.
    """

    def __init__(self, seconds: float, end: Callable[[], None] = end_now):
        self._seconds = seconds
        self._end = end
        self._under_way = 0
        self._idle = asyncio.Event()
        self._waiting: asyncio.Task[None] | None = None

    @property
    def draining(self) -> bool:
        """Whether the end has begun."""
        return self._waiting is not None

    def install(self) -> None:
        """Take SIGTERM over. Call it in the running event loop, after vLLM and uvicorn have set their own handlers."""
        if self._seconds > 0 and threading.current_thread() is threading.main_thread():
            asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, self.begin)

    def begin(self) -> None:
        """Refuse new requests from now on, and end when the last answer is over; a second call ends at once."""
        if self._waiting is not None:
            self._end()
            return
        _logger.warning("SIGTERM: %d answers under way are finished, for %g s at most", self._under_way, self._seconds)
        self._waiting = asyncio.ensure_future(self._wait())

    def check(self) -> None:
        """RequestError, 503 with Retry-After: the server is about to end."""
        if self.draining:
            raise RequestError(
                "this replica is shutting down; send the request again, to another replica",
                "draining",
                status=503,
                retry_after_s=RETRY_AFTER_S,
            )

    @contextmanager
    def answering(self) -> Iterator[None]:
        """While an answer is under way."""
        self._under_way += 1
        try:
            yield
        finally:
            self._under_way -= 1
            if self._under_way == 0:
                self._idle.set()

    async def _wait(self) -> None:
        if self._under_way:
            self._idle.clear()
            idle = asyncio.ensure_future(self._idle.wait())
            await asyncio.wait({idle}, timeout=self._seconds)
            idle.cancel()
            if self._under_way:
                _logger.warning("%d answers are broken off: they took longer than %g s", self._under_way, self._seconds)
        self._end()
