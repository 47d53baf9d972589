"""MatGPTQScheduler: keeps the KV blocks of profiles apart and refuses requests for profiles that this replica lacks.

Use: ``--scheduler-cls`` this class's path. It sees every request, whichever way it entered the engine, so it is also where a
narrower max width begins to hold (``core.width_limit``): the limit comes as a request of its own, which is answered when no
request beyond the limit is left.
"""

import hashlib
import logging
from copy import copy
from typing import Any

from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs, FinishReason
from vllm.v1.request import RequestStatus

from matgptq_vllm.compat.replica import open_replica
from matgptq_vllm.compat.runner import followed_group, requested_precision
from matgptq_vllm.compat.self_draft import drafts_itself
from matgptq_vllm.core.errors import InputError
from matgptq_vllm.core.precision import XARGS_KEY, precision_of_salt
from matgptq_vllm.core.width_limit import LIMIT_REACHED, WidthLimit

_logger = logging.getLogger(__name__)


class _PrecisionScheduling:
    """What both of vLLM's schedulers gain."""

    requests: dict[str, Any]

    def __init__(self, vllm_config: Any, *args: Any, **kwargs: Any):
        super().__init__(vllm_config, *args, **kwargs)  # type: ignore[call-arg]
        if drafts_itself(vllm_config):
            # Blocks for the tokens that are drafted after a step: the method's other users write none.
            self.num_lookahead_tokens = vllm_config.speculative_config.num_speculative_tokens
        replica = open_replica(vllm_config)
        self._all_profiles = self._catalogue = replica.catalogue
        self._widths = replica.max_widths
        self._token = getattr(vllm_config.quant_config, "control_token", None)
        self._refused: dict[str, tuple[int, str]] = {}  # request id -> (client index, why)
        self._limits: dict[str, tuple[int, WidthLimit]] = {}  # request id -> (client index, limit), to be answered

    def add_request(self, request: Any) -> None:
        limit = WidthLimit.from_extra_args(getattr(request.sampling_params, "extra_args", None), self._token)
        if limit is not None:
            self._set_limit(request, limit)
            return
        try:
            _take_precision_of_salt(request)
            profile = self._catalogue.resolve(requested_precision(request))
        except InputError as error:
            # Raising here would end the engine for everybody. The request ends instead, with the reason.
            _logger.warning("Request %s is refused: %s", request.request_id, error)
            self._refused[request.request_id] = (request.client_index, str(error))
            return
        request.profile = profile
        if self._all_profiles.resolve(requested_precision(request)) != profile:
            # The workers know one default only.
            _name_precision(request, profile)
        # Prefix-cache entries are found by hash, and the salt is part of it: keys and values computed at one profile are
        # never found by another. Block hashes were computed when the request was made, so they are computed again.
        request.cache_salt = f"{request.cache_salt or ''}|precision={profile}"
        request.block_hashes.clear()
        request.update_block_hashes()
        if followed_group(request.sampling_params) is not None:
            _keep_output_apart(request)
        super().add_request(request)  # type: ignore[misc]

    def get_num_unfinished_requests(self) -> int:
        # What is to be answered counts until the answer is out, or the engine would not step to send it.
        return super().get_num_unfinished_requests() + len(self._refused) + len(self._limits)  # type: ignore[misc]

    def finish_requests(self, request_ids: Any, *args: Any, **kwargs: Any) -> Any:
        for request_id in [*self._refused, *self._limits] if request_ids is None else _as_ids(request_ids):
            self._refused.pop(request_id, None)
            self._limits.pop(request_id, None)
        return super().finish_requests(request_ids, *args, **kwargs)  # type: ignore[misc]

    def update_from_output(self, *args: Any, **kwargs: Any) -> dict[int, EngineCoreOutputs]:
        outputs: dict[int, EngineCoreOutputs] = super().update_from_output(*args, **kwargs)  # type: ignore[misc]

        def answer(client: int, request_id: str, reason: FinishReason, text: str) -> None:
            output = EngineCoreOutput(request_id, [], finish_reason=reason, stop_reason=text)
            outputs.setdefault(client, EngineCoreOutputs()).outputs.append(output)

        for request_id, (client, text) in self._refused.items():
            answer(client, request_id, FinishReason.ERROR, text)
        self._refused.clear()
        for request_id, (client, limit) in list(self._limits.items()):
            if not self._beyond(limit.max_width):
                answer(client, request_id, FinishReason.STOP, LIMIT_REACHED)
                del self._limits[request_id]
        return outputs

    def _set_limit(self, request: Any, limit: WidthLimit) -> None:
        self._catalogue = self._all_profiles.within(limit.max_width, self._widths)
        beyond = self._beyond(limit.max_width)
        if limit.refuses and beyond:
            # As if their clients had gone, except that they are told.
            self.finish_requests([each.request_id for each in beyond], RequestStatus.FINISHED_ABORTED)
            for each in beyond:
                self._refused[each.request_id] = (each.client_index, f"max width {limit.max_width} was set while it ran")
        self._limits[request.request_id] = (request.client_index, limit)

    def _beyond(self, max_width: int) -> list[Any]:
        """Unfinished requests that were admitted at a profile that needs more than ``max_width``."""
        return [request for request in self.requests.values() if self._widths[request.profile] > max_width]


class MatGPTQSyncScheduler(_PrecisionScheduling, Scheduler):
    """For engines without asynchronous scheduling."""


class MatGPTQScheduler(_PrecisionScheduling, AsyncScheduler):
    """The scheduler to name; becomes the synchronous one where asynchronous scheduling is off."""

    def __new__(cls, vllm_config: Any, *args: Any, **kwargs: Any) -> Any:
        # vLLM turns asynchronous scheduling off for a class that is not an AsyncScheduler, so the named class must be one.
        if cls is MatGPTQScheduler and not vllm_config.scheduler_config.async_scheduling:
            return MatGPTQSyncScheduler(vllm_config, *args, **kwargs)
        return super().__new__(cls)


def _take_precision_of_salt(request: Any) -> None:
    """Give a request whose parameters ask for nothing the precision that its cache salt names, if it does.

    vLLM's beam search makes the parameters of its requests itself, and keeps of the prompt the salt.
    """
    precision = precision_of_salt(request.cache_salt)
    if precision is not None and request.sampling_params is not None and requested_precision(request) is None:
        _name_precision(request, precision)


def _name_precision(request: Any, precision: str) -> None:
    """Make ``request`` ask for ``precision``."""
    # The parameters may be those of several requests.
    if request.sampling_params is not None:
        request.sampling_params = copy(request.sampling_params)
        request.sampling_params.extra_args = {**(request.sampling_params.extra_args or {}), XARGS_KEY: precision}
    elif request.pooling_params is not None:
        request.pooling_params = copy(request.pooling_params)
        request.pooling_params.extra_kwargs = {**(request.pooling_params.extra_kwargs or {}), XARGS_KEY: precision}


def _keep_output_apart(request: Any) -> None:
    """Let no other request find the blocks that follow the prompt of ``request``: its profile may change in them.

    The prompt's own blocks are computed at the profile of admission (``engine.followers``), and are shared as ever.
    """
    hash_blocks = request._block_hasher
    if hash_blocks is not None:
        owner = request.request_id.encode()
        request._block_hasher = lambda request: [hashlib.sha256(block + owner).digest() for block in hash_blocks(request)]


def _as_ids(request_ids: Any) -> list[str]:
    return [request_ids] if isinstance(request_ids, str) else list(request_ids)
