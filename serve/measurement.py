"""The sweep of serve.sweep through vLLM's own engine client. The other file of this package that needs vLLM, when it runs."""

import logging
import time
import uuid
from typing import TYPE_CHECKING, Any

from matgptq_vllm.core.precision import XARGS_KEY
from serve.control import Control
from serve.sweep import Sweep

if TYPE_CHECKING:
    from vllm.engine.protocol import EngineClient

logger = logging.getLogger(__name__)

TOKEN_ID = 1
"""Of which the prompts consist: their text does not matter."""


async def measure(engine_client: "EngineClient", control: Control, seconds: float) -> None:
    """Measure step times before the server listens, and keep them. A failure is logged: the model then learns online."""
    from vllm import SamplingParams

    async def generate(profile: str, prompt_tokens: int, tokens: int) -> None:
        parameters = SamplingParams(
            max_tokens=tokens, min_tokens=tokens, ignore_eos=True, detokenize=False, extra_args={XARGS_KEY: profile}
        )
        prompt: Any = {"prompt_token_ids": [TOKEN_ID] * prompt_tokens}
        async for _ in engine_client.generate(prompt, parameters, f"sweep-{uuid.uuid4().hex}"):
            pass

    started = time.monotonic()
    try:
        max_batch = engine_client.vllm_config.scheduler_config.max_num_seqs
        whole = await Sweep(control.model.profiles, max_batch, seconds).run(generate, control.tracker)
    except Exception as error:
        # Whatever the engine has against these requests, it may serve others.
        logger.warning("step times could not be measured (%s: %s); they are learned from requests", type(error).__name__, error)
        return
    control.source = "sweep"
    control.store_model()
    logger.info(
        "measured step times in %.1f s%s: a token at %s takes about %s ms",
        time.monotonic() - started,
        "" if whole else " (not all batch sizes)",
        "/".join(control.model.profiles),
        "/".join(f"{control.predicted_ms(profile, 1)}" for profile in control.model.profiles),
    )
