"""vLLM's statistics, passed on: steps to the step observer, finished sequences to the metrics, by precision. The one file
of this package that needs vLLM to be imported.

vLLM loads it in every server of the environment, also where no MatGPTQ replica runs; then it records nothing.
"""

import logging
from typing import TYPE_CHECKING, Any

from vllm.v1.metrics.loggers import StatLoggerBase

from serve.metrics import FinishedSequence, precision_metrics
from serve.request_details import RequestDetails
from serve.request_ids import request_precisions
from serve.sequence_outcome import observe_outcome
from serve.step_observer import step_observer

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.metrics.stats import IterationStats, MultiModalCacheStats, SchedulerStats

_logger = logging.getLogger(__name__)


class PrecisionStatLogger(StatLoggerBase):
    """Entry point of the group ``vllm.stat_logger_plugins``; vLLM makes one per engine."""

    def __init__(self, vllm_config: "VllmConfig", engine_index: int = 0):
        self.engine_index = engine_index
        self._vllm_config = vllm_config
        self._failed = False

    def record(
        self,
        scheduler_stats: "SchedulerStats | None",
        iteration_stats: "IterationStats | None",
        mm_cache_stats: "MultiModalCacheStats | None" = None,
        engine_idx: int = 0,
    ) -> None:
        """Take in one step. Runs in vLLM's output loop, where an exception would stop the engine."""
        observer, joined = step_observer(), request_precisions()
        if observer.is_heard:
            scheduling = getattr(self._vllm_config, "scheduler_config", None)
            observer.record(
                scheduler_stats,
                iteration_stats,
                engine_idx,
                kv_cache_tokens(self._vllm_config),
                getattr(scheduling, "max_num_batched_tokens", None),
            )
        if not joined.enabled:
            return
        for stats in () if iteration_stats is None else iteration_stats.finished_requests:
            engine_id = getattr(stats, "request_id", None)
            details = joined.details_of(engine_id)
            try:
                observe_outcome(
                    precision_metrics(),
                    joined.precision_of(engine_id),
                    details if isinstance(details, RequestDetails) else None,
                    finished_sequence(stats),
                )
            except Exception:
                # Said once: what fails for one sequence may fail for every one.
                if not self._failed:
                    self._failed = True
                    _logger.exception("A finished sequence could not be booked; later failures are not logged")

    def log_engine_initialized(self) -> None:
        """Nothing to say: the replica describes itself in ``matgptq_replica_info``."""


def finished_sequence(stats: Any) -> FinishedSequence:
    """The measurements in vLLM's ``FinishedRequestStats``; 0 for a field that this release does not have.

    vLLM says that these classes may change between releases, hence no attribute is taken for granted.
    """
    cached = getattr(stats, "num_cached_tokens", None)
    return FinishedSequence(
        num_prompt_tokens=max(0, getattr(stats, "num_prompt_tokens", None) or 0),
        num_generation_tokens=max(0, getattr(stats, "num_generation_tokens", None) or 0),
        e2e_latency=max(0.0, getattr(stats, "e2e_latency", None) or 0.0),
        queued_time=max(0.0, getattr(stats, "queued_time", None) or 0.0),
        decode_time=max(0.0, getattr(stats, "decode_time", None) or 0.0),
        mean_time_per_output_token=max(0.0, getattr(stats, "mean_time_per_output_token", None) or 0.0),
        num_cached_tokens=None if cached is None else max(0, cached),
    )


def kv_cache_tokens(vllm_config: Any) -> int | None:
    """Tokens that the KV cache of one engine holds, None if unknown; an upper bound for models with several kinds of cache.

    vLLM's number of blocks is a sum over data-parallel engines, and is filled in when they have started.
    """
    cache = getattr(vllm_config, "cache_config", None)
    blocks, size = getattr(cache, "num_gpu_blocks", None), getattr(cache, "block_size", None)
    if not blocks or not size:
        return None
    engines = getattr(getattr(vllm_config, "parallel_config", None), "data_parallel_size", None) or 1
    return blocks * size // engines
