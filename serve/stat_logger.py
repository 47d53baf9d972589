"""vLLM's statistics of finished requests, by precision. The one file of this package that needs vLLM to be imported.

vLLM loads it in every server of the environment, also where no MatGPTQ replica runs; then it records nothing.
"""

from typing import TYPE_CHECKING, Any

from vllm.v1.metrics.loggers import StatLoggerBase

from serve.metrics import FinishedSequence, precision_metrics
from serve.request_ids import request_precisions

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.metrics.stats import IterationStats, MultiModalCacheStats, SchedulerStats


class PrecisionStatLogger(StatLoggerBase):
    """Entry point of the group ``vllm.stat_logger_plugins``; vLLM makes one per engine."""

    def __init__(self, vllm_config: "VllmConfig", engine_index: int = 0):
        self.engine_index = engine_index

    def record(
        self,
        scheduler_stats: "SchedulerStats | None",
        iteration_stats: "IterationStats | None",
        mm_cache_stats: "MultiModalCacheStats | None" = None,
        engine_idx: int = 0,
    ) -> None:
        """Count what ended in one step. Runs in vLLM's output loop, where an exception would stop the engine."""
        joined = request_precisions()
        if iteration_stats is None or not joined.enabled:
            return
        for stats in iteration_stats.finished_requests:
            precision = joined.precision_of(getattr(stats, "request_id", None))
            precision_metrics().sequence_finished(precision, finished_sequence(stats))

    def log_engine_initialized(self) -> None:
        """Nothing to say: the replica describes itself in ``matgptq_replica_info``."""


def finished_sequence(stats: Any) -> FinishedSequence:
    """The measurements in vLLM's ``FinishedRequestStats``; 0 for a field that this release does not have.

    vLLM says that these classes may change between releases, hence no attribute is taken for granted.
    """
    return FinishedSequence(
        num_prompt_tokens=max(0, getattr(stats, "num_prompt_tokens", None) or 0),
        num_generation_tokens=max(0, getattr(stats, "num_generation_tokens", None) or 0),
        e2e_latency=max(0.0, getattr(stats, "e2e_latency", None) or 0.0),
        queued_time=max(0.0, getattr(stats, "queued_time", None) or 0.0),
        decode_time=max(0.0, getattr(stats, "decode_time", None) or 0.0),
        mean_time_per_output_token=max(0.0, getattr(stats, "mean_time_per_output_token", None) or 0.0),
    )
