"""ASGI middleware: chooses the precision of each generation request and tells vLLM, and the client, which it is.

It is installed inside vLLM's authentication, so that a request without a valid key is neither read nor counted. The
request body is read whole, within a bound, before vLLM sees the request; the response passes untouched but for two
headers. Prompts and keys are neither logged nor quoted in errors.
"""

from collections.abc import Callable

from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from serve.errors import RequestError, error_body
from serve.exchange import Exchange
from serve.metrics import PrecisionMetrics
from serve.replica import Replica
from serve.request_body import RequestBody, read_body
from serve.request_ids import RequestPrecisions, identify
from serve.selection import precision_header, select
from serve.settings import Settings

GENERATION_PATHS = frozenset(
    {
        "/v1/completions",
        "/v1/chat/completions",
        "/v1/chat/completions/batch",
        "/v1/responses",
        "/v1/messages",
        "/invocations",
    }
)
"""Paths of vLLM whose POST body takes ``vllm_xargs``."""


class PrecisionMiddleware:
    """Pure ASGI middleware.

    Args:
        app: the application inside.
        replica: what the replica holds; None as long as it is not known, or if the engine is no MatGPTQ replica.
        settings: bounds of one request.
        metrics: counts requests.
        request_precisions: learns the precision of every request in flight.
    """

    def __init__(
        self,
        app: ASGIApp,
        replica: Callable[[], Replica | None],
        settings: Settings,
        metrics: PrecisionMetrics,
        request_precisions: RequestPrecisions,
    ):
        self.app = app
        self._replica = replica
        self._settings = settings
        self._metrics = metrics
        self._request_precisions = request_precisions

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Give a generation request its precision; let everything else pass."""
        if scope["type"] != "http" or scope["method"] != "POST" or route_path(scope) not in GENERATION_PATHS:
            await self.app(scope, receive, send)
            return
        try:
            exchange = await self._open(scope, receive, send)
        except RequestError as error:
            self._metrics.request_rejected(error.rejection)
            await JSONResponse(error_body(error), status_code=error.status)(scope, receive, send)
            return
        if exchange is not None:
            await self._run(exchange)

    async def _open(self, scope: Scope, receive: Receive, send: Send) -> Exchange | None:
        """Read the request and choose its precision; None if the client went away. RequestError: it is refused."""
        headers = scope["headers"]
        if sum(len(name) + len(value) for name, value in headers) > self._settings.max_header_bytes:
            raise RequestError(
                f"the request headers are larger than {self._settings.max_header_bytes} bytes", "too_large", status=431
            )
        replica = self._replica()
        header = precision_header(headers, None if replica is None else replica.catalogue)
        if replica is None:
            if header is not None:
                raise RequestError(
                    "this server has one precision only: its engine is no MatGPTQ replica; leave X-Precision out, or start "
                    "the server with `matgptq serve`",
                    "unsupported",
                    param="X-Precision",
                )
            return Exchange.unchanged(scope, receive, send)
        raw = await read_body(receive, headers, self._settings.max_body_bytes)
        if raw is None:
            return None
        body = RequestBody.parse(raw)
        selection = select(body.selectors(header), replica.catalogue, replica.models)
        identity = identify(route_path(scope), headers, body.request_id)
        return Exchange(
            {**scope, "headers": identity.headers},
            receive,
            send,
            body=body.rewritten(selection, identity.new_field),
            selection=selection,
            request_id=identity.request_id,
        )

    async def _run(self, exchange: Exchange) -> None:
        selection = exchange.selection
        if selection is None:
            await self.app(exchange.scope, exchange.receive, exchange.send)
            return
        if exchange.request_id is not None:
            self._request_precisions.begin(exchange.request_id, selection.profile)
        try:
            await self.app(exchange.scope, exchange.receive, exchange.send)
        except BaseException:
            exchange.failed = True
            raise
        finally:
            if exchange.request_id is not None:
                self._request_precisions.end(exchange.request_id)
            self._metrics.request_ended(selection.profile, selection.reason, exchange.outcome)


def route_path(scope: Scope) -> str:
    """The path that vLLM's routes see: ``scope["path"]`` below the root path that the server is mounted at."""
    path: str = scope["path"]
    root: str = scope.get("root_path", "")
    return path[len(root) :] if root and path.startswith(root + "/") else path
