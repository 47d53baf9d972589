"""vLLM endpoint plugin: installs the middleware and serves ``GET /v1/precisions``.

vLLM calls ``attach_router`` while it builds its application, before it adds its own middleware: what is added here is
therefore inside authentication. It calls ``init_state`` when the engine runs, before the server listens.
"""

import logging
import os
from argparse import Namespace
from typing import TYPE_CHECKING

from fastapi import FastAPI
from starlette.datastructures import State
from starlette.responses import JSONResponse

from matgptq_vllm.core.errors import UnsupportedError
from serve.command import WORKER_CLASS
from serve.errors import error_body
from serve.metrics import PrecisionMetrics, precision_metrics
from serve.middleware import PrecisionMiddleware
from serve.replica import REPLICA_RPC, LiveReports, Replica
from serve.request_ids import RequestPrecisions, request_precisions
from serve.settings import Settings

if TYPE_CHECKING:
    from vllm.engine.protocol import EngineClient

PRECISIONS_PATH = "/v1/precisions"

logger = logging.getLogger(__name__)


class PrecisionEndpoints:
    """Entry point of the group ``vllm.endpoint_plugins``; vLLM calls it without arguments.

    Args:
        settings: unset, read from the environment: this is the entry point of the API process.
        metrics, joined: unset, those of the process, which ``/metrics`` shows.
    """

    name = "matgptq_endpoints"
    required_tasks = ("generate",)

    def __init__(
        self,
        settings: Settings | None = None,
        metrics: PrecisionMetrics | None = None,
        joined: RequestPrecisions | None = None,
    ):
        self._settings = settings or Settings.from_env(os.environ)
        self._metrics = metrics or precision_metrics()
        self._joined = request_precisions() if joined is None else joined
        self._replica: Replica | None = None
        self._live: LiveReports | None = None

    def attach_router(self, app: FastAPI) -> None:
        """Add the middleware and the endpoint to vLLM's application."""
        app.add_middleware(
            PrecisionMiddleware,
            replica=lambda: self._replica,
            settings=self._settings,
            metrics=self._metrics,
            request_precisions=self._joined,
        )
        app.add_api_route(
            PRECISIONS_PATH, self._precisions, methods=["GET"], response_class=JSONResponse, summary="Precisions held"
        )

    async def init_state(self, engine_client: "EngineClient | None", state: State, args: Namespace) -> None:
        """Ask the workers what they hold.

        Raises:
            UnsupportedError: the workers are ours but contradict each other.
            Exception: as the engine raises it, if our workers cannot answer.
        """
        if engine_client is None:
            return

        async def fetch() -> list[dict]:
            return await engine_client.collective_rpc(REPLICA_RPC)

        try:
            reports = await fetch()
        except Exception as error:
            # The engine passes a worker's failure on as a bare Exception.
            if getattr(args, "worker_cls", None) == WORKER_CLASS:
                raise
            logger.warning(
                "This engine is no MatGPTQ replica (%s); requests with X-Precision are refused", type(error).__name__
            )
            return
        self._replica = Replica.from_reports(reports, served_names(args))
        self._live = LiveReports(fetch, self._settings.rpc_timeout_ms / 1000)
        self._joined.enabled = True
        self._metrics.replica_loaded(self._replica)

    async def _precisions(self) -> JSONResponse:
        """The profiles that this replica holds, and live numbers of its workers."""
        if self._replica is None or self._live is None:
            error = UnsupportedError("this server's engine is no MatGPTQ replica; start it with `matgptq serve`")
            return JSONResponse(error_body(error), status_code=501)
        return JSONResponse(self._replica.to_json(await self._live.get()))


def served_names(args: Namespace) -> list[str]:
    """Names under which vLLM serves the model, aliases included; ``args`` are vLLM's parsed arguments."""
    names = getattr(args, "served_model_name", None) or [args.model]
    return [names] if isinstance(names, str) else list(names)
