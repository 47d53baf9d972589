"""ASGI middleware: chooses the precision of each generation request and tells vLLM, and the client, which it is.

It is installed inside vLLM's authentication, so that a request without a valid key is neither read nor counted. Where there
are tenants, their keys are checked here, before anything is read. The request body is read whole, within a bound, before
vLLM sees the request and before it takes a place in the load or a quota, so that a slow sender holds neither; the response
passes untouched but for two headers. Prompts and keys are neither logged nor quoted in errors.
"""

from collections.abc import Callable, Iterable

from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from serve.budget_headers import budget_request
from serve.control import Control
from serve.drain import Drain
from serve.errors import RequestError, error_body
from serve.exchange import Exchange
from serve.metrics import PrecisionMetrics
from serve.request_body import RequestBody, read_body
from serve.request_ids import RequestPrecisions, identify
from serve.request_log import log_rejection, log_request
from serve.selection import precision_header, select
from serve.settings import Settings
from serve.tenants import Tenant
from serve.tracing import request_span

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

UNMETERED_PATHS = frozenset({"/inference/v1/generate", "/cohere/v2/chat", "/generative_scoring", "/v1/systemone"})
"""Paths of vLLM that compute without ``vllm_xargs``: neither a precision nor a quota can be enforced there."""

GUARDED_PREFIXES = ("/v1", "/v2", "/inference", "/cohere")
"""What vLLM guards with --api-key, and we with the keys of tenants."""

SLO_PATH = "/v1/slo"

PRECISIONS_PATH = "/v1/precisions"

ADMIN_REQUESTS = frozenset({("PUT", SLO_PATH), ("POST", PRECISIONS_PATH)})
"""Methods and paths that check the admin key themselves; it is no tenant's."""


class PrecisionMiddleware:
    """Pure ASGI middleware.

    Args:
        app: the application inside.
        control: what decides; None as long as the replica is not known, or if the engine is no MatGPTQ replica.
        settings: bounds of one request.
        metrics: counts requests.
        request_precisions: learns the precision of every request in flight.
        drain: refuses generation requests once the server is about to end, and waits for those under way.
    """

    def __init__(
        self,
        app: ASGIApp,
        control: Callable[[], Control | None],
        settings: Settings,
        metrics: PrecisionMetrics,
        request_precisions: RequestPrecisions,
        drain: Drain,
    ):
        self.app = app
        self._control = control
        self._settings = settings
        self._metrics = metrics
        self._request_precisions = request_precisions
        self._drain = drain

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Give a generation request its precision; let everything else pass, if it has a key where keys are needed."""
        if scope["type"] == "websocket" and self._has_tenants() and route_path(scope).startswith(GUARDED_PREFIXES):
            # A socket has neither precision nor quota. Closed before it is accepted: the client gets 403.
            await send({"type": "websocket.close", "code": 1008})
            return
        if scope["type"] == "lifespan":
            self._drain.install()
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        path = route_path(scope)
        generates = scope["method"] == "POST" and path in GENERATION_PATHS
        computes = generates or (scope["method"] == "POST" and path in UNMETERED_PATHS)
        tenant: Tenant | None = None
        try:
            if computes:
                self._drain.check()
            if generates or needs_key(path, scope["method"]):
                tenant = self._tenant(scope)
            if path in UNMETERED_PATHS and self._has_tenants():
                raise RequestError("this endpoint cannot be used on a server with tenants", "tenant", status=403)
            exchange = await self._open(scope, receive, send, tenant) if generates else None
        except RequestError as error:
            self._metrics.request_rejected(error.rejection)
            if tenant is not None:
                self._metrics.tenant_rejected(tenant.name, error.rejection)
            log_rejection(scope, error, None if tenant is None else tenant.name)
            await JSONResponse(error_body(error), status_code=error.status, headers=error.headers)(scope, receive, send)
            return
        if not computes:
            await self.app(scope, receive, send)
        elif not generates:
            with self._drain.answering():
                await self.app(scope, receive, send)
        elif exchange is not None:
            with self._drain.answering():
                await self._run(exchange)

    def _has_tenants(self) -> bool:
        control = self._control()
        return control is not None and control.tenants is not None

    def _tenant(self, scope: Scope) -> Tenant | None:
        control = self._control()
        return None if control is None else control.tenant_of(api_key(scope["headers"]))

    async def _open(self, scope: Scope, receive: Receive, send: Send, tenant: Tenant | None) -> Exchange | None:
        """Read the request and choose its precision; None if the client went away. RequestError: it is refused."""
        headers = scope["headers"]
        if sum(len(name) + len(value) for name, value in headers) > self._settings.max_header_bytes:
            raise RequestError(
                f"the request headers are larger than {self._settings.max_header_bytes} bytes", "too_large", status=431
            )
        control = self._control()
        header = precision_header(headers, None if control is None else control.replica.catalogue)
        asked = budget_request(headers)
        if control is None:
            if header is not None or asked.budget is not None:
                raise RequestError(
                    "this server has one precision only: its engine is no MatGPTQ replica; leave X-Precision and budgets out, "
                    "or start the server with `matgptq serve`",
                    "unsupported",
                    param="X-Precision",
                )
            return Exchange.unchanged(scope, receive, send)
        raw = await read_body(receive, headers, self._settings.max_body_bytes)
        if raw is None:
            return None
        self._drain.check()  # again: a body may take long to come
        try:
            body = RequestBody.parse(raw)
            selection = select(body.selectors(header), control.replica.catalogue, control.replica.models)
        except RecursionError:
            raise _too_deep() from None
        identity = identify(route_path(scope), headers, body.request_id)
        admitted = control.admission.admit(selection, asked, tenant, body.size(len(raw)))
        try:
            rewritten = body.rewritten(admitted.selection, identity.new_field, admitted.group)
        except RecursionError:
            # Writing takes more of the stack than reading: what could just be read may fail here.
            admitted.finish(400)
            raise _too_deep() from None
        return Exchange(
            {**scope, "headers": identity.headers},
            receive,
            send,
            body=rewritten,
            selection=admitted.selection,
            request_id=identity.request_id,
            admitted=admitted,
        )

    async def _run(self, exchange: Exchange) -> None:
        selection, admitted = exchange.selection, exchange.admitted
        if selection is None or admitted is None:
            await self.app(exchange.scope, exchange.receive, exchange.send)
            return
        if exchange.request_id is not None:
            self._request_precisions.begin(exchange.request_id, selection.profile, admitted.details)
        if admitted.details.tenant is not None:
            self._metrics.tenant_request(admitted.details.tenant, selection.profile)
        control = self._control()
        in_flight = set() if control is None else control.in_flight
        in_flight.add(exchange)
        try:
            with request_span(exchange.scope, selection.profile, admitted.details, lambda: exchange.outcome) as scope:
                await self.app(scope, exchange.receive, exchange.send)
        except BaseException:
            exchange.failed = True
            raise
        finally:
            in_flight.discard(exchange)
            admitted.finish(exchange.outcome)
            if exchange.request_id is not None:
                self._request_precisions.end(exchange.request_id)
            self._metrics.request_ended(selection.profile, selection.reason, exchange.outcome)
            log_request(exchange)


def route_path(scope: Scope) -> str:
    """The path that vLLM's routes see: ``scope["path"]`` below the root path that the server is mounted at."""
    path: str = scope["path"]
    root: str = scope.get("root_path", "")
    return path[len(root) :] if root and path.startswith(root + "/") else path


def needs_key(path: str, method: str) -> bool:
    """Whether a request to ``path`` is for tenants only, where there are tenants: as vLLM has it with --api-key."""
    return method != "OPTIONS" and path.startswith(GUARDED_PREFIXES) and (method, path) not in ADMIN_REQUESTS


def api_key(headers: Iterable[tuple[bytes, bytes]]) -> str | None:
    """The key in ``Authorization: Bearer KEY``, else in ``X-API-Key``; None if there is none, or it is ambiguous."""
    bearer, plain, others = _keys(headers)
    return bearer or (None if others else plain)


def admin_keys(headers: Iterable[tuple[bytes, bytes]]) -> list[str]:
    """What may be the admin key: either header, because vLLM's --api-key wants the first one for itself."""
    bearer, plain, _ = _keys(headers)
    return [key for key in (bearer, plain) if key is not None]


def _keys(headers: Iterable[tuple[bytes, bytes]]) -> tuple[str | None, str | None, bool]:
    """(``Authorization: Bearer KEY``, ``X-API-Key``, whether there is any Authorization); a key that is empty, or whose
    header occurs more than once, is none."""
    found: dict[bytes, list[bytes]] = {b"authorization": [], b"x-api-key": []}
    for name, value in headers:
        found.get(name.lower(), []).append(value)
    authorization, plain = found.values()
    bearer = [value[7:] for value in authorization if value[:7].lower() == b"bearer "] if len(authorization) == 1 else []
    keys = [values[0].strip().decode("latin-1") or None if len(values) == 1 else None for values in (bearer, plain)]
    return keys[0], keys[1], bool(authorization)


def _too_deep() -> RequestError:
    return RequestError("the request body is not a JSON object: nested too deeply", "body")
