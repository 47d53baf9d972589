"""Calls of a running engine that change its max width. Needs vLLM, when it runs."""

import uuid
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from matgptq_vllm.core.errors import MatGPTQError
from matgptq_vllm.core.width_limit import LIMIT_REACHED, WidthLimit
from serve.replica import REPLICA_RPC, Report

if TYPE_CHECKING:
    from vllm.engine.protocol import EngineClient

SHRINK_RPC = "matgptq_shrink"
GROW_RPC = "matgptq_grow"
"""Names of the worker methods that drop planes, and begin to read them."""


class EngineCalls:
    """The calls, of one engine."""

    def __init__(self, engine_client: "EngineClient"):
        self._client: Any = engine_client

    async def reports(self) -> Sequence[Report]:
        """What every worker says of itself."""
        reports: Sequence[Report] = await self._client.collective_rpc(REPLICA_RPC)
        return reports

    async def limit(self, max_width: int, refuses: bool) -> None:
        """Hold the scheduler to ``max_width``; returns when no wider request is in flight.

        Raises:
            MatGPTQError: the engine gave no answer, as when it is stopped.
        """
        from vllm import SamplingParams

        extra_args = WidthLimit(max_width, refuses).to_extra_args(self._client.vllm_config.quant_config.control_token)
        parameters = SamplingParams(max_tokens=1, detokenize=False, extra_args=extra_args)
        prompt = {"prompt_token_ids": [0]}
        async for output in self._client.generate(prompt, parameters, f"width-limit-{uuid.uuid4().hex}"):
            if output.finished and output.outputs[0].stop_reason == LIMIT_REACHED:
                return
        raise MatGPTQError(f"the engine did not confirm max width {max_width}")

    async def shrink(self, max_width: int) -> Sequence[Report]:
        """Let the workers drop planes."""
        reports: Sequence[Report] = await self._client.collective_rpc(SHRINK_RPC, args=(max_width,))
        return reports

    async def grow(self, max_width: int) -> Sequence[Report]:
        """Let the workers begin to read planes."""
        reports: Sequence[Report] = await self._client.collective_rpc(GROW_RPC, args=(max_width,))
        return reports
