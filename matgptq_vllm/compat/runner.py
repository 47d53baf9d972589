"""The per-step hook of both of vLLM's model runners.

A runner already built by vLLM's worker becomes an instance of a subclass of its own class, which is the one seam that
all supported releases have in common (``Worker._make_model_runner`` is newer). Methods overridden, by runner:

    runner  before a step                       when the order of the rows is known
    V1      execute_model(scheduler_output)     _prepare_inputs(...), then input_batch.req_ids
    V2      execute_model(scheduler_output)     prepare_inputs(...), which returns an InputBatch with req_ids
    both    _dummy_run(...), to profile, to capture, or beside other data-parallel ranks: no requests
    both    capture_model(...), around every capture of CUDA graphs
    V2      initialize_kv_cache(...), which makes the manager of the graphs
"""

import logging
from typing import Any, Literal

import numpy as np

from matgptq_vllm.compat import graphs
from matgptq_vllm.core.precision import GROUP_KEY, XARGS_KEY
from matgptq_vllm.engine.precision_state import PrecisionState

_logger = logging.getLogger(__name__)

V2_PACKAGES = ("vllm.v1.worker.gpu.", "vllm.v1.worker.cpu.")


def requested_precision(request: Any) -> object:
    """What the parameters of a request, as the scheduler or the runner knows it, ask for; None if they do not."""
    extra: dict[str, Any] | None = None
    if request.sampling_params is not None:
        extra = request.sampling_params.extra_args
    elif request.pooling_params is not None:
        extra = request.pooling_params.extra_kwargs
    return (extra or {}).get(XARGS_KEY)


def followed_group(sampling_params: Any) -> str | None:
    """The group whose level a request follows; None if it keeps its profile."""
    extra_args = getattr(sampling_params, "extra_args", None) or {}
    group = extra_args.get(GROUP_KEY)
    return None if group is None else str(group)


def runner_version(runner: object) -> Literal["v1", "v2"]:
    """Which of vLLM's model runners ``runner`` is."""
    return "v2" if any(base.__module__.startswith(V2_PACKAGES) for base in type(runner).__mro__) else "v1"


def add_precision(runner: Any, state: PrecisionState, graph_profiles: tuple[int, ...] = ()) -> None:
    """Make ``runner`` write the profiles of every step into ``state``'s buffers before it.

    Args:
        graph_profiles: indices of profiles whose batches get CUDA graphs of their own, see ``compat.graphs``.
    """
    mixin = _V2Precision if runner_version(runner) == "v2" else _V1Precision
    base = type(runner)
    runner.precision_state = state
    runner.__class__ = type(f"MatGPTQ{base.__name__}", (mixin, base), {})
    if graph_profiles:
        if (why := graphs.unsupported(runner.vllm_config, runner_version(runner))) is None:
            runner.graph_profiles = graph_profiles
        else:
            _logger.warning("CUDA graphs by width are off: %s", why)


class _Precision:
    precision_state: PrecisionState

    def _before_step(self, scheduler_output: Any) -> None:
        """Called when the profiles of the step's requests are known, and nothing else."""

    def execute_model(self, scheduler_output: Any, *args: Any, **kwargs: Any) -> Any:
        state = self.precision_state
        state.remove_requests(scheduler_output.finished_req_ids)
        # A request resumed after preemption comes again as new to runner V2, and as resumed to V1.
        running = scheduler_output.scheduled_cached_reqs
        state.advance(running.req_ids, running.num_computed_tokens, running.resumed_req_ids)
        for request in scheduler_output.scheduled_new_reqs:
            prompt = request.prompt_embeds if request.prompt_token_ids is None else request.prompt_token_ids
            state.add_request(
                request.req_id,
                requested_precision(request),
                followed_group(request.sampling_params),
                num_prompt_tokens=0 if prompt is None else len(prompt),
            )
        self._before_step(scheduler_output)
        return super().execute_model(scheduler_output, *args, **kwargs)  # type: ignore[misc]

    def capture_model(self, *args: Any, **kwargs: Any) -> Any:
        # Graphs serve steps of any profiles, unless one says otherwise while it is captured.
        self.precision_state.reset_step()
        try:
            return super().capture_model(*args, **kwargs)  # type: ignore[misc]
        finally:
            self.precision_state.reset_step()

    def _dummy_run(self, *args: Any, **kwargs: Any) -> Any:
        # What the last step left describes more rows than this run may have.
        self.precision_state.reset_step()
        return super()._dummy_run(*args, **kwargs)  # type: ignore[misc]


class _V1Precision(_Precision):
    def _prepare_inputs(self, scheduler_output: Any, num_scheduled_tokens: np.ndarray, *args: Any, **kwargs: Any) -> Any:
        # num_scheduled_tokens is in the order of input_batch.req_ids, which may hold requests beyond this step's.
        inputs = super()._prepare_inputs(scheduler_output, num_scheduled_tokens, *args, **kwargs)  # type: ignore[misc]
        req_ids = self.input_batch.req_ids[: len(num_scheduled_tokens)]  # type: ignore[attr-defined]
        self.precision_state.write_step(req_ids, num_scheduled_tokens)
        return inputs


class _V2Precision(_Precision):
    graph_profiles: tuple[int, ...] = ()
    """Indices of the profiles with graphs of their own."""

    def initialize_kv_cache(self, *args: Any, **kwargs: Any) -> None:
        # Here vLLM makes the manager of its graphs, before it captures any.
        super().initialize_kv_cache(*args, **kwargs)  # type: ignore[misc]
        if self.graph_profiles:
            graphs.key_by_profile(self.cudagraph_manager, self.precision_state, self.graph_profiles)  # type: ignore[attr-defined]

    def _before_step(self, scheduler_output: Any) -> None:
        if self.graph_profiles and self.cudagraph_manager is not None:  # type: ignore[attr-defined]
            req_ids = list(scheduler_output.num_scheduled_tokens)
            profile = self.precision_state.common_profile(req_ids) if req_ids else None
            self.cudagraph_manager.step_profile = profile  # type: ignore[attr-defined]

    def prepare_inputs(self, *args: Any, **kwargs: Any) -> Any:
        # Runner V2 sorts the batch, so only the batch it returns knows the order of the rows.
        batch = super().prepare_inputs(*args, **kwargs)  # type: ignore[misc]
        self.precision_state.write_step(batch.req_ids, batch.num_scheduled_tokens)
        return batch
