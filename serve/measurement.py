"""The sweep of serve.sweep through vLLM's own engine client."""

import logging
import time
from functools import partial
from typing import TYPE_CHECKING

from serve.control import Control
from serve.sweep import Sweep
from serve.trial_request import generate

if TYPE_CHECKING:
    from vllm.engine.protocol import EngineClient

_logger = logging.getLogger(__name__)


async def measure(engine_client: "EngineClient", control: Control, seconds: float) -> None:
    """Measure step times before the server listens, and keep them. A failure is logged: the model then learns online."""
    started = time.monotonic()
    try:
        max_batch = engine_client.vllm_config.scheduler_config.max_num_seqs
        whole = await Sweep(control.model.profiles, max_batch, seconds).run(partial(generate, engine_client), control.tracker)
    except Exception as error:
        # Whatever the engine has against these requests, it may serve others.
        _logger.warning(
            "step times could not be measured (%s: %s); they are learned from requests", type(error).__name__, error
        )
        return
    control.source = "sweep"
    control.model.refit()
    control.store_model()
    _logger.info(
        "measured step times in %.1f s%s: a token at %s takes about %s ms",
        time.monotonic() - started,
        "" if whole else " (not all batch sizes)",
        "/".join(control.model.profiles),
        "/".join(f"{control.predicted_ms(profile, 1)}" for profile in control.model.profiles),
    )
