"""A request of our own through vLLM's engine client, before the server listens. Imports vLLM when it runs."""

import uuid
from typing import TYPE_CHECKING, Any

from matgptq_vllm.core.precision import XARGS_KEY

if TYPE_CHECKING:
    from vllm.engine.protocol import EngineClient

TOKEN_ID = 1
"""Of which the prompts consist: their text does not matter."""


async def generate(engine_client: "EngineClient", profile: str | None, prompt_tokens: int, tokens: int) -> int:
    """Compute one request to its end; returns how many tokens came.

    Args:
        profile: the precision; None for an engine that knows no precisions.

    Raises:
        Exception: as the engine raises it.
    """
    from vllm import SamplingParams

    parameters = SamplingParams(
        max_tokens=tokens,
        min_tokens=tokens,
        ignore_eos=True,
        detokenize=False,
        extra_args=None if profile is None else {XARGS_KEY: profile},
    )
    prompt: Any = {"prompt_token_ids": [TOKEN_ID] * prompt_tokens}
    came = 0
    async for output in engine_client.generate(prompt, parameters, f"trial-{uuid.uuid4().hex}"):
        came = sum(len(completion.token_ids) for completion in output.outputs)
    return came
