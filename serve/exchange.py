"""One request and its response on their way through the middleware."""

import asyncio
import json
import time

from starlette.datastructures import MutableHeaders
from starlette.types import Message, Receive, Scope, Send

from matgptq_vllm.core.precision import PRECISION_HEADER, REASON_HEADER
from serve.admission import Admitted
from serve.errors import RequestError, error_body
from serve.selection import Selection

CLIENT_WENT_AWAY = 499
"""Outcome of a request whose client did not wait for the answer; counted, never sent."""

_BODY_HEADERS = (b"content-length", b"transfer-encoding")


class Exchange:
    """Replays a rewritten request body, marks the response with the selection, and keeps track of how it ended.

    Args:
        scope: the request; Content-Length is set to that of ``body``.
        body: what the application reads in place of the client's body. None: the client's own.
        selection: reported in the response headers. None: nothing is.
        request_id: id under which the request is tracked, None if it is not.
        admitted: what was decided about the request; None if nothing was.
    """

    def __init__(
        self,
        scope: Scope,
        receive: Receive,
        send: Send,
        body: bytes | None,
        selection: Selection | None,
        request_id: str | None = None,
        admitted: Admitted | None = None,
    ):
        if body is not None:
            headers = [(name, value) for name, value in scope["headers"] if name.lower() not in _BODY_HEADERS]
            scope = {**scope, "headers": [*headers, (b"content-length", str(len(body)).encode())]}
        self.scope = scope
        self.selection = selection
        self.request_id = request_id
        self.admitted = admitted
        self.started_at = time.monotonic()
        self.first_byte_at: float | None = None
        self.streamed = False
        self.failed = False
        self._receive = receive
        self._send = send
        self._body = body
        self._held_start: Message | None = None
        self._status = 0
        self._complete = False
        self._disconnected = False
        self._refused = asyncio.Event()

    @classmethod
    def unchanged(cls, scope: Scope, receive: Receive, send: Send) -> "Exchange":
        """A request that passes as it is."""
        return cls(scope, receive, send, body=None, selection=None)

    @property
    def outcome(self) -> int:
        """HTTP status of the answer: CLIENT_WENT_AWAY if nobody took it, 500 if it broke off."""
        if self._complete:
            return self._status
        return 500 if self.failed and not self._disconnected else CLIENT_WENT_AWAY

    async def receive(self) -> Message:
        """The rewritten body, once; then whatever the client sends, which is how a disconnect is noticed.

        A request that is refused meanwhile reads as one whose client went away.
        """
        if self._body is not None:
            # Dropped at once: a long stream must not hold a long prompt.
            body, self._body = self._body, None
            return {"type": "http.request", "body": body, "more_body": False}
        received = asyncio.ensure_future(self._client_message())
        refused = asyncio.ensure_future(self._refused.wait())
        try:
            await asyncio.wait({received, refused}, return_when=asyncio.FIRST_COMPLETED)
            return received.result() if received.done() else {"type": "http.disconnect"}
        finally:
            received.cancel()
            refused.cancel()

    async def refuse(self, error: RequestError) -> None:
        """End the request with an error in place of the rest of the answer: the application sees a client that went away.

        Nothing happens to an answer that is on its way as a whole.
        """
        # What is held is not sent: then the status is still free.
        started = bool(self._status) and self._held_start is None
        if self._complete or self._refused.is_set() or (started and not self.streamed):
            return
        self._refused.set()
        self._held_start = None
        text = json.dumps(error_body(error))
        if not started:
            headers = [(b"content-type", b"application/json"), (b"content-length", str(len(text)).encode())]
            await self._send({"type": "http.response.start", "status": error.status, "headers": headers})
        else:
            text = f"data: {text}\n\n"
        self._status = error.status
        self._complete = True
        await self._send({"type": "http.response.body", "body": text.encode()})

    async def _client_message(self) -> Message:
        message = await self._receive()
        # Noted here, ahead of the way back to the application: it may send its whole answer before it hears of it.
        self._disconnected = self._disconnected or message["type"] == "http.disconnect"
        return message

    async def send(self, message: Message) -> None:
        """Pass ``message`` on, with the response headers of the selection; nothing, once the request is refused or the client
        gone.

        The headers wait for the first piece of the answer: as long as a client, or a router, has seen nothing, the request
        may be sent to another replica.
        """
        if self._refused.is_set() or self._disconnected:
            # The application gets its turn to hear of it.
            await asyncio.sleep(0)
            return
        if message["type"] == "http.response.start":
            self._status = message["status"]
            kind = MutableHeaders(raw=list(message.get("headers", []))).get("content-type", "")
            self.streamed = kind.startswith("text/event-stream")
            if self.selection is not None:
                message = {**message, "headers": list(message.get("headers", []))}
                headers = MutableHeaders(raw=message["headers"])
                headers[PRECISION_HEADER] = self.selection.profile
                headers[REASON_HEADER] = self.selection.reason
            self._held_start = message
            return
        if self._held_start is not None:
            start, self._held_start = self._held_start, None
            await self._send(start)
        await self._send(message)
        if self.first_byte_at is None and message.get("body"):
            self.first_byte_at = time.monotonic()
        if message["type"] == "http.response.body" and not message.get("more_body", False):
            self._complete = True
