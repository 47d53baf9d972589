"""GET /ready: whether this replica should be given requests. /health says only that its processes live."""

import logging
from typing import TYPE_CHECKING

from serve.drain import Drain
from serve.trial_request import generate

if TYPE_CHECKING:
    from vllm.engine.protocol import EngineClient

READY_PATH = "/ready"

_logger = logging.getLogger(__name__)


class Readiness:
    """Ready: the model is loaded, the engine has generated a token and lives, and the server is not about to end."""

    def __init__(self, drain: Drain):
        self._drain = drain
        self._engine_client: EngineClient | None = None
        self._problem = "the model is not loaded yet"

    async def loaded(self, engine_client: "EngineClient", profile: str | None) -> None:
        """Generate one token at ``profile`` (None: the engine knows none). A failure is logged; the replica stays unready."""
        try:
            # Two tokens: an engine that skips its own warm-up traces its graph by this step, and a graph that is traced by a
            # single row is right for single rows alone.
            tokens = await generate(engine_client, profile, prompt_tokens=2, tokens=1)
        except Exception as error:
            tokens = 0
            _logger.error("the first token could not be generated (%s: %s)", type(error).__name__, error)
        if tokens == 0:
            self._problem = "the engine could not generate a first token; see the server's log"
            return
        self._engine_client = engine_client

    async def problem(self) -> str | None:
        """What speaks against sending requests; None: nothing."""
        if self._drain.draining:
            return "the replica is shutting down"
        if self._engine_client is None:
            return self._problem
        try:
            await self._engine_client.check_health()
        except Exception as error:
            return f"the engine is dead ({type(error).__name__})"
        return None
