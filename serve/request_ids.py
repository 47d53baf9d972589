"""Which precision a request of the engine has, by request id: joins the HTTP side with vLLM's statistics.

vLLM derives the id that its statistics carry from an id of the HTTP request: the X-Request-Id header, or the body's
``request_id`` where that header is absent or the endpoint does not read it.

    endpoint               id in the statistics (base: the HTTP request's id)
    completions            ``cmpl-{base}-{prompt}``
    chat, messages         ``chatcmpl-{base}``, ``chatcmpl-{base}_{conversation}`` in batches
    responses              ``{base}`` or ``{base}_{turn}``
    any, parallel samples  one record per sample, all with the same id; ``{sample}_`` before it in some releases
"""

import re
import uuid
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from types import MappingProxyType

UNKNOWN = "unknown"
"""Precision of an engine request that did not come through the middleware, or whose id is ambiguous."""

MAX_ENDED = 4096
"""Ended requests that are still remembered: the last statistics arrive after the response, and a background response
(``/v1/responses`` with ``background``) is computed after its answer."""

MAX_ID_CHARS = 256
"""Longer ids of clients are not tracked, so that they cannot fill memory."""

HEADER = b"x-request-id"
RESPONSES_PATH = "/v1/responses"
MESSAGES_PATH = "/v1/messages"

RawHeaders = list[tuple[bytes, bytes]]

_PREFIX = re.compile(r"(\d+_)?(cmpl-|chatcmpl-)")
_SUFFIX = re.compile(r"[-_]\d+$")


@dataclass(frozen=True)
class Identity:
    """The id that vLLM derives its engine ids from, and what has to be added to the request so that it is known."""

    request_id: str | None
    """None: vLLM will refuse the request, its id is no string."""

    headers: RawHeaders
    """The request's headers, with an X-Request-Id if one was needed."""

    new_field: str | None = None
    """Value to add as the body's ``request_id``, if one is needed."""


def identify(path: str, headers: Sequence[tuple[bytes, bytes]], body_id: object) -> Identity:
    """The identity of the request to ``path``: the client's own id where it has one, else a new one.

    Args:
        body_id: the body's ``request_id``, None if it has none.
    """
    header = next((value.decode("latin-1") for name, value in headers if name.lower() == HEADER), None)
    new = uuid.uuid4().hex
    own = body_id if isinstance(body_id, str) else None
    if path == RESPONSES_PATH:
        if body_id is not None:
            return Identity(own, list(headers))
        return Identity(f"resp_{new}", list(headers), new_field=f"resp_{new}")
    if header is not None:
        return Identity(header, list(headers))
    if body_id is not None and path != MESSAGES_PATH:
        return Identity(own, list(headers))
    return Identity(new, [*headers, (HEADER, new.encode())])


@dataclass(frozen=True)
class _Known:
    precision: str
    details: object


class RequestPrecisions:
    """Precisions of the requests in flight and of the latest ``max_ended`` others. For one event loop, not for threads."""

    def __init__(self, max_ended: int = MAX_ENDED):
        self.max_ended = max_ended
        self.enabled = False
        """Set once a replica's profiles are known: statistics of any other vLLM server are left alone."""
        self._known: dict[str, _Known] = {}
        self._num_active: dict[str, int] = {}
        self._ended: OrderedDict[str, None] = OrderedDict()

    def __len__(self) -> int:
        return len(self._known)

    @property
    def in_flight(self) -> MappingProxyType[str, int]:
        """Request id -> how many requests with it have not ended."""
        return MappingProxyType(self._num_active)

    def begin(self, request_id: str, precision: str, details: object = None) -> None:
        """A request with ``request_id`` is computed at ``precision`` from now on.

        Args:
            details: whatever shall be found again by ``details_of``. Where requests in flight share an id but not their
                details, nothing is found: one request's outcome must not be booked on another.
        """
        if len(request_id) > MAX_ID_CHARS:
            return
        active = self._num_active.get(request_id, 0)
        if active:
            known = self._known[request_id]
            precision = precision if known.precision == precision else UNKNOWN
            details = details if known.details == details else None
        self._known[request_id] = _Known(precision, details)
        self._num_active[request_id] = active + 1
        self._ended.pop(request_id, None)

    def end(self, request_id: str) -> None:
        """The response to a request that began with ``request_id`` is over."""
        active = self._num_active.pop(request_id, 0)
        if active > 1:
            self._num_active[request_id] = active - 1
        elif active == 1:
            self._ended[request_id] = None
            if len(self._ended) > self.max_ended:
                oldest, _ = self._ended.popitem(last=False)
                del self._known[oldest]

    def precision_of(self, engine_id: object) -> str:
        """Precision of the engine's request ``engine_id``; UNKNOWN if it cannot be told."""
        known = self._find(engine_id)
        return UNKNOWN if known is None else known.precision

    def details_of(self, engine_id: object) -> object:
        """What ``begin`` was given for the engine's request ``engine_id``; None if that was nothing or cannot be told."""
        known = self._find(engine_id)
        return None if known is None else known.details

    def _find(self, engine_id: object) -> _Known | None:
        if not isinstance(engine_id, str):
            return None
        base = _PREFIX.sub("", engine_id, count=1) if _PREFIX.match(engine_id) else engine_id
        for candidate in (base, _SUFFIX.sub("", base), engine_id, _SUFFIX.sub("", engine_id)):
            if candidate in self._known:
                return self._known[candidate]
        return None


@cache
def request_precisions() -> RequestPrecisions:
    """The one of this process: the middleware writes it, vLLM's statistics are read with it."""
    return RequestPrecisions()
