"""MatGPTQWorker: vLLM's worker of this platform, with per-request precision. Use: ``--worker-cls`` this class's path."""

import logging
from typing import TYPE_CHECKING, Any

from vllm.config import set_current_vllm_config
from vllm.platforms import current_platform

from matgptq_vllm.compat import graphs
from matgptq_vllm.compat.overlap import let_compiled_kernels_overlap
from matgptq_vllm.compat.replica import replica_of
from matgptq_vllm.compat.runner import add_precision, runner_version
from matgptq_vllm.compat.self_draft import drafts_itself
from matgptq_vllm.core.errors import UnsupportedError
from matgptq_vllm.core.parent import QUANT_METHOD
from matgptq_vllm.core.precision import uniform_name
from matgptq_vllm.core.replica import SELF_DRAFT_CLASS
from matgptq_vllm.engine.elastic import ElasticPlanes
from matgptq_vllm.engine.precision_state import PrecisionState
from matgptq_vllm.engine.replica import Replica

if TYPE_CHECKING or not current_platform.is_cpu():
    from vllm.v1.worker.gpu_worker import Worker as _PlatformWorker
else:
    from vllm.v1.worker.cpu_worker import CPUWorker as _PlatformWorker

_logger = logging.getLogger(__name__)


class MatGPTQWorker(_PlatformWorker):
    """A worker that serves a parent with per-request precision."""

    def init_device(self) -> None:
        """Start the worker; UnsupportedError if the model is not a parent, or if vLLM would fail with it later."""
        if self.model_config.quantization != QUANT_METHOD:
            raise UnsupportedError(
                f"{self.model_config.model}: the model's quantization is {self.model_config.quantization!r}; "
                f"this worker serves parents written by `matgptq calibrate` ({QUANT_METHOD!r})"
            )
        if current_platform.is_cpu() and self.parallel_config.pipeline_parallel_size > 1:
            raise UnsupportedError(
                f"pipeline_parallel_size is {self.parallel_config.pipeline_parallel_size}, but on a CPU vLLM fails in the "
                "first step of a pipeline, whatever the model; use tensor_parallel_size, or a GPU"
            )
        super().init_device()

    def load_model(self, *args: Any, **kwargs: Any) -> None:
        assert self.device is not None  # set by init_device
        replica = replica_of(self.vllm_config)
        if replica.memory_reason is not None:
            _logger.info("Memory budget: %s", replica.memory_reason)
        self._not_elastic = self._make_elastic(replica)
        let_compiled_kernels_overlap(self.vllm_config)
        super().load_model(*args, **kwargs)
        # Of the two, the replica outlives the engine's layers.
        self._elastic, replica.elastic = replica.elastic, None
        self._widths = replica.max_widths
        max_tokens = self.vllm_config.scheduler_config.max_num_batched_tokens
        self.precision_state = PrecisionState(replica.catalogue, replica.step_buffers(max_tokens, self.device))
        widths = self._graph_widths(replica)
        graph_profiles = tuple(replica.catalogue.index(uniform_name(width)) for width in widths)
        add_precision(self.model_runner, self.precision_state, graph_profiles)
        if drafts_itself(self.vllm_config):
            _attach_draft(self.model_runner, replica, self.precision_state)
        self._static_report = _static_report(replica, self.model_runner)
        self._plane_bytes, self._scale_bytes, self._other_bytes = _resident_bytes(self.model_runner.get_model())
        # Before vLLM measures how much memory is free: the processes that compile take some while they run.
        quantization: Any = self.vllm_config.quant_config
        quantization.compile_kernels(self.model_runner.get_model(), self.device, _logger.info, widths, graphs.MAX_REQUESTS)

    def reload_weights(self, *args: Any, weights_path: str | None = None, **kwargs: Any) -> None:
        """Read the weights again, as after sleep of level 2; UnsupportedError if they are to come from another parent."""
        if weights_path is not None:
            raise UnsupportedError(
                f"weights cannot be reloaded from {weights_path!r}: a running replica keeps its parent, "
                f"{self.model_config.model}; start another one, or leave weights_path out"
            )
        if self._elastic is not None and self._elastic.max_width != self._elastic.available:
            raise UnsupportedError(
                f"weights cannot be reloaded while planes are dropped; first go back to max width {self._elastic.available}"
            )
        # The loader asks for the configuration, which vLLM sets for the first load only.
        with set_current_vllm_config(self.vllm_config):
            super().reload_weights(*args, **kwargs)

    def matgptq_replica(self) -> dict[str, Any]:
        """What this worker holds and has computed (``collective_rpc``)."""
        elastic = self._elastic
        if elastic is not None:
            was = elastic.max_width
            elastic.finish()
            if elastic.max_width != was:
                self.precision_state.limit(elastic.max_width, self._widths)
        held = self._plane_bytes if elastic is None else self._plane_bytes[: elastic.num_planes(elastic.max_width)]
        return {
            **self._static_report,
            "held_max_width": self._static_report["max_width"] if elastic is None else elastic.max_width,
            "growing": elastic is not None and elastic.growing,
            "growing_failed": None if elastic is None else elastic.failure,
            "not_elastic": self._not_elastic,
            "code_bytes": sum(held),
            "scale_bytes": self._scale_bytes,
            "other_bytes": self._other_bytes,
            "steps": self.precision_state.num_steps,
            "tokens": self.precision_state.tokens_by_profile(),
        }

    def matgptq_follow(self, levels: dict[str, str | None]) -> None:
        """Running requests of these groups go to these profiles, each after its prompt (``collective_rpc``)."""
        self.precision_state.follow(levels)

    def matgptq_shrink(self, max_width: int) -> dict[str, Any]:
        """Drop the planes beyond ``max_width``; no request in flight may need them (``collective_rpc``)."""
        elastic = self._checked_elastic()
        elastic.shrink(max_width)
        self.precision_state.limit(elastic.max_width, self._widths)
        return self.matgptq_replica()

    def matgptq_grow(self, max_width: int) -> dict[str, Any]:
        """Begin to read the planes for ``max_width`` again; reports say when they are there (``collective_rpc``)."""
        self._checked_elastic().grow(max_width)
        return self.matgptq_replica()

    def _graph_widths(self, replica: Replica) -> tuple[int, ...]:
        """Widths whose batches get CUDA graphs of their own."""
        assert self.device is not None
        if replica.options.graph_widths is not None:
            return replica.options.graph_widths
        by_default = graphs.by_default(self.vllm_config, runner_version(self.model_runner), self.device)
        return tuple(replica.widths) if by_default else ()

    def _checked_elastic(self) -> ElasticPlanes:
        if self._elastic is None:
            raise UnsupportedError(self._not_elastic or "planes cannot be dropped here")
        return self._elastic

    def _make_elastic(self, replica: Replica) -> str | None:
        """Let the replica's planes be dropped at run time; why not, if they cannot."""
        assert self.device is not None
        if getattr(self.model_config, "enable_sleep_mode", False):
            return "in sleep mode, all weights are in the memory of vLLM's allocator; start without --enable-sleep-mode"
        if self.load_config.load_format == "dummy":
            return "its weights are random (--load-format dummy); what is dropped could not be read again"
        try:
            replica.make_elastic(self.device)
        except UnsupportedError as error:
            _logger.warning("The max width cannot be changed while this replica runs: %s", error)
            return str(error)
        return None


def _attach_draft(runner: Any, replica: Replica, state: PrecisionState) -> None:
    """Make the runner's drafter run the model at the replica's draft width; UnsupportedError if it has none."""
    width = replica.options.draft_width
    if width is None:
        raise UnsupportedError(
            f"the speculative configuration names {SELF_DRAFT_CLASS}, but no width is to draft; start with --draft-width"
        )
    bits = replica.average_bits()
    wider = frozenset(index for index, name in enumerate(replica.catalogue.profiles) if bits[name] > width)
    # Only the last pipeline rank drafts.
    if hasattr(runner, "drafter"):
        runner.drafter.attach(runner, state, replica.catalogue.index(uniform_name(width)), wider)


def _static_report(replica: Replica, runner: Any) -> dict[str, Any]:
    """The part of a worker's report that stays as it is after loading: asking for it must not cost the engine a step."""
    return {
        "profiles": list(replica.catalogue.profiles),
        "profile_widths": replica.max_widths,
        "default": replica.catalogue.default,
        "max_width": replica.options.max_width,
        "memory_budget": replica.options.memory_budget,
        "memory_reason": replica.memory_reason,
        "slice_rule": replica.reader.spec.slice_rule,
        "runner": runner_version(runner),
        "device": current_platform.get_device_name() or current_platform.device_name,
        "parent": replica.digest(),
        "average_bits": replica.average_bits(),
        "bytes_per_weight": replica.bytes_per_weight(),
        "perplexity": replica.perplexities(),
        "weight_bytes": {str(width): replica.resident.total(width) for width in replica.widths},
    }


def _resident_bytes(model: Any) -> tuple[list[int], int, int]:
    """Bytes of each plane, of the scales, and of all other weights."""
    planes: dict[int, int] = {}
    scales = others = 0
    for name, parameter in model.named_parameters():
        leaf = name.rpartition(".")[2]
        if leaf.startswith("plane"):
            plane = int(leaf.removeprefix("plane"))
            planes[plane] = planes.get(plane, 0) + parameter.nbytes
        elif leaf == "scales":
            scales += parameter.nbytes
        else:
            others += parameter.nbytes
    return [planes[plane] for plane in sorted(planes)], scales, others
