"""vLLM endpoint plugin: installs the middleware, and serves ``/v1/precisions``, ``PUT /v1/slo``, ``GET /ready`` and the
playground.

vLLM calls ``attach_router`` while it builds its application, before it adds its own middleware: what is added here is
therefore inside authentication. It calls ``init_state`` when the engine runs, before the server listens.
"""

import asyncio
import logging
import os
import sys
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from fastapi import FastAPI, Request
from starlette.datastructures import State
from starlette.responses import JSONResponse

from matgptq_vllm import __version__
from matgptq_vllm.core.errors import MatGPTQError, UnsupportedError
from serve import request_log
from serve.command import WORKER_CLASS
from serve.control import Control, EngineLimits, parse_slo
from serve.drain import Drain
from serve.elastic import Elastic, parse_change
from serve.endpoint_schemas import (
    PRECISIONS_RESPONSES,
    READY_RESPONSES,
    SLO_REQUEST,
    SLO_RESPONSES,
    WIDTH_REQUEST,
    WIDTH_RESPONSES,
)
from serve.errors import RequestError, error_body, status_of
from serve.following import FOLLOW_RPC, Levels
from serve.latency_cache import LatencyCache, cache_folder
from serve.measurement import measure
from serve.metrics import PrecisionMetrics, precision_metrics
from serve.middleware import PRECISIONS_PATH, SLO_PATH, PrecisionMiddleware, admin_keys
from serve.playground.route import add_playground
from serve.readiness import READY_PATH, Readiness
from serve.replica import LiveReports, Replica, Report
from serve.request_body import read_body
from serve.request_ids import RequestPrecisions, request_precisions
from serve.settings import Settings
from serve.step_observer import StepObserver, step_observer
from serve.tenant_reload import TenantReload
from serve.width_limit import EngineCalls

if TYPE_CHECKING:
    from vllm.engine.protocol import EngineClient

MAX_ADMIN_BYTES = 4096

_logger = logging.getLogger(__name__)


class PrecisionEndpoints:
    """Entry point of the group ``vllm.endpoint_plugins``; vLLM calls it without arguments.

    Args:
        settings: unset, read from the environment: this is the entry point of the API process.
        metrics, joined, observer: unset, those of the process, which vLLM's statistics reach.
    """

    name = "matgptq_endpoints"
    required_tasks = ("generate",)

    def __init__(
        self,
        settings: Settings | None = None,
        metrics: PrecisionMetrics | None = None,
        joined: RequestPrecisions | None = None,
        observer: StepObserver | None = None,
    ):
        self._settings = settings or Settings.from_env(os.environ)
        self._metrics = metrics or precision_metrics()
        self._joined = request_precisions() if joined is None else joined
        self._observer = step_observer() if observer is None else observer
        self._control: Control | None = None
        self._live: LiveReports | None = None
        self._following: asyncio.Task[None] | None = None
        self._drain = Drain(self._settings.drain_seconds)
        self._readiness = Readiness(self._drain)
        self._elastic: Elastic | None = None

    def attach_router(self, app: FastAPI) -> None:
        """Add the middleware, the endpoints and the playground to vLLM's application."""
        app.add_middleware(
            PrecisionMiddleware,
            control=lambda: self._control,
            settings=self._settings,
            metrics=self._metrics,
            request_precisions=self._joined,
            drain=self._drain,
        )
        app.add_api_route(
            PRECISIONS_PATH,
            self._precisions,
            methods=["GET"],
            response_class=JSONResponse,
            summary="Precisions held",
            responses=PRECISIONS_RESPONSES,
        )
        app.add_api_route(
            PRECISIONS_PATH,
            self._change_width,
            methods=["POST"],
            response_class=JSONResponse,
            summary="Drop planes, or read them again",
            responses=WIDTH_RESPONSES,
            openapi_extra=WIDTH_REQUEST,
        )
        app.add_api_route(
            SLO_PATH,
            self._set_slo,
            methods=["PUT"],
            response_class=JSONResponse,
            summary="Change what auto aims at",
            responses=SLO_RESPONSES,
            openapi_extra=SLO_REQUEST,
        )
        app.add_api_route(
            READY_PATH,
            self._ready,
            methods=["GET"],
            response_class=JSONResponse,
            summary="Whether to send requests here",
            responses=READY_RESPONSES,
        )
        add_playground(app)
        if self._settings.request_log:
            request_log.enable(sys.stderr)

    async def init_state(self, engine_client: "EngineClient | None", state: State, args: Namespace) -> None:
        """Ask the workers what they hold, and learn how long steps take.

        Raises:
            UnsupportedError: the workers are ours but contradict each other.
            InputError: the settings name a profile that the replica does not hold, or the tenants' file is wrong.
            Exception: as the engine raises it, if our workers cannot answer.
        """
        if engine_client is None:
            return

        calls = EngineCalls(engine_client)
        try:
            reports = await calls.reports()
        except Exception as error:
            # The engine passes a worker's failure on as a bare Exception.
            if getattr(args, "worker_cls", None) == WORKER_CLASS:
                raise
            _logger.warning(
                "This engine is no MatGPTQ replica (%s); requests with X-Precision are refused", type(error).__name__
            )
            await self._readiness.loaded(engine_client, None)
            return
        replica = Replica.from_reports(reports, served_names(args))
        cache = LatencyCache(cache_folder(self._settings.latency_cache), cache_key(reports[0], len(reports)))
        control = Control.of(
            replica, self._settings, self._observer, self._tenants(replica), cache, engine_limits(engine_client)
        )
        if control.source == "none" and self._settings.sweep_seconds > 0:
            await measure(engine_client, control, self._settings.sweep_seconds)
        await self._readiness.loaded(engine_client, replica.catalogue.default)
        control.admission.on_switch = self._metrics.switched
        control.tracker.on_step(lambda *_: self._metrics.model_error(control.model.mean_error or 0.0))
        if control.following is not None:

            async def follow(levels: Levels) -> object:
                return await engine_client.collective_rpc(FOLLOW_RPC, args=(dict(levels),))

            self._following = asyncio.create_task(control.following.run(follow))
        self._control = control
        self._live = LiveReports(calls.reports, self._settings.rpc_timeout_ms / 1000)
        self._joined.enabled = True
        self._metrics.replica_loaded(replica)
        self._show_resident(reports)
        self._elastic = Elastic(control, calls, self._width_changed, obstacle(reports, engine_client, args))

    def _tenants(self, replica: Replica) -> TenantReload | None:
        if self._settings.tenants_file is None:
            return None
        return TenantReload(Path(self._settings.tenants_file), replica.catalogue)

    async def _precisions(self) -> JSONResponse:
        """The profiles that this replica holds, what it has learned, and live numbers of its workers."""
        if self._control is None or self._live is None or self._elastic is None:
            return _answer(_no_replica())
        workers = await self._live.get()
        return JSONResponse({**self._control.to_json(workers), **self._elastic.to_json()})

    async def _change_width(self, request: Request) -> JSONResponse:
        """Drop the planes beyond a width, or read them again. Needs the admin key; answers when it is done."""
        try:
            raw = await self._admin_body(request)
            if self._elastic is None:
                raise _no_replica()
            await self._elastic.change(parse_change(raw))
        except MatGPTQError as error:
            return _answer(error)
        return await self._precisions()

    async def _admin_body(self, request: Request) -> bytes:
        """The body of a request that needs the admin key; MatGPTQError if it is not there."""
        if self._control is None:
            raise _no_replica()
        if not any(self._control.is_admin(key) for key in admin_keys(request.scope["headers"])):
            raise RequestError("this needs the admin key (environment variable MATGPTQ_ADMIN_KEY of the server)", "key", 403)
        return await read_body(request.receive, request.scope["headers"], MAX_ADMIN_BYTES) or b""

    def _width_changed(self, reports: Sequence[Report]) -> None:
        if self._control is not None:
            self._metrics.replica_holds(self._control.replica)
        self._show_resident(reports)

    def _show_resident(self, reports: Sequence[Report]) -> None:
        self._metrics.resident(*(sum(report.get(kind) or 0 for report in reports) for kind in ("code_bytes", "scale_bytes")))

    async def _ready(self) -> JSONResponse:
        """Whether to send requests to this replica; a load balancer's question."""
        problem = await self._readiness.problem()
        return JSONResponse({"ready": problem is None, "problem": problem}, status_code=200 if problem is None else 503)

    async def _set_slo(self, request: Request) -> JSONResponse:
        """Change what ``auto`` requests aim at, until the next start. Needs the admin key."""
        try:
            raw = await self._admin_body(request)
            if self._control is None:
                raise _no_replica()
            self._control.set_slo(parse_slo(raw))
        except MatGPTQError as error:
            return _answer(error)
        return JSONResponse(self._control.slo_json())


def _no_replica() -> UnsupportedError:
    return UnsupportedError("this server's engine is no MatGPTQ replica; start it with `matgptq serve`")


def _answer(error: MatGPTQError) -> JSONResponse:
    return JSONResponse(error_body(error), status_code=status_of(error))


def obstacle(reports: Sequence[Report], engine_client: object, args: Namespace) -> str | None:
    """Why the max width cannot be changed while the server runs; None if it can."""
    told = next((str(report["not_elastic"]) for report in reports if report.get("not_elastic")), None)
    if told is not None:
        return told
    if (getattr(args, "api_server_count", None) or 1) > 1:
        return "several API processes would not know of it; start with --api-server-count 1"
    parallel = getattr(getattr(engine_client, "vllm_config", None), "parallel_config", None)
    if getattr(parallel, "data_parallel_size", 1) > 1:
        return "with data parallelism there are several schedulers; run replicas of their own instead"
    return None


def engine_limits(engine_client: object) -> EngineLimits:
    """What vLLM's scheduler is configured to do at once."""
    scheduler = getattr(getattr(engine_client, "vllm_config", None), "scheduler_config", None)
    if scheduler is None:
        return EngineLimits()
    return EngineLimits(scheduler.max_num_seqs, scheduler.max_num_batched_tokens)


def cache_key(report: Report, num_workers: int) -> dict[str, object]:
    """What step times depend on, by a worker's report."""
    names = ("device", "parent", "max_width", "runner", "profiles")
    return {**{name: report.get(name) for name in names}, "workers": num_workers, "version": __version__}


def served_names(args: Namespace) -> list[str]:
    """Names under which vLLM serves the model, aliases included; ``args`` are vLLM's parsed arguments."""
    names = getattr(args, "served_model_name", None) or [args.model]
    return [names] if isinstance(names, str) else list(names)
