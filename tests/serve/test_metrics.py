"""Prometheus metrics by precision, fed by the middleware and by vLLM's statistics."""

import json
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
from prometheus_client import CollectorRegistry, generate_latest
from vllm.v1.engine import FinishReason
from vllm.v1.metrics.loggers import StatLoggerBase
from vllm.v1.metrics.stats import FinishedRequestStats, IterationStats, SchedulerStats

import serve.stat_logger
from serve.errors import REJECTIONS
from serve.metrics import MAX_TENANTS, FinishedSequence, PrecisionMetrics
from serve.replica import Replica
from serve.request_details import RequestDetails
from serve.request_ids import RequestPrecisions
from serve.selection import REASONS
from serve.stat_logger import PrecisionStatLogger, finished_sequence, kv_cache_tokens
from serve.step_observer import StepObserver


@pytest.fixture
def registry():
    return CollectorRegistry()


@pytest.fixture
def metrics(registry):
    return PrecisionMetrics(registry)


@pytest.fixture
def observer(monkeypatch):
    observer = StepObserver()
    monkeypatch.setattr(serve.stat_logger, "step_observer", lambda: observer)
    return observer


@pytest.fixture
def joined(monkeypatch, metrics, observer):
    joined = RequestPrecisions()
    monkeypatch.setattr(serve.stat_logger, "request_precisions", lambda: joined)
    monkeypatch.setattr(serve.stat_logger, "precision_metrics", lambda: metrics)
    return joined


def finished(request_id: str, **values) -> FinishedRequestStats:
    return FinishedRequestStats(finish_reason=FinishReason.STOP, request_id=request_id, **values)


def record(*stats) -> None:
    iteration = IterationStats()
    iteration.finished_requests.extend(stats)
    logger = PrecisionStatLogger(None, 0)
    assert isinstance(logger, StatLoggerBase)
    logger.log_engine_initialized()
    logger.record(scheduler_stats=None, iteration_stats=iteration, mm_cache_stats=None, engine_idx=0)


def test_vllms_statistics_are_counted_by_the_precision_of_their_request(registry, joined):
    joined.enabled = True
    joined.begin("a", "4", RequestDetails("budget"))
    joined.begin("b", "2", "details of somebody else")
    times = {"e2e_latency": 3.0, "queued_time": 0.25, "decode_time": 2.0, "mean_time_per_output_token": 0.5}
    record(
        finished("cmpl-a-0", num_prompt_tokens=7, num_generation_tokens=5, **times),
        finished("cmpl-a-1", num_prompt_tokens=3, num_generation_tokens=5, **times),
        finished("chatcmpl-b", num_prompt_tokens=1, num_generation_tokens=1, e2e_latency=1.0),
        finished("somebody", num_prompt_tokens=100, num_generation_tokens=0),
    )
    value = registry.get_sample_value
    budget, unknown = {"precision": "4", "reason": "budget"}, {"precision": "2", "reason": "unknown"}
    assert value("matgptq_prompt_tokens_total", budget) == 10
    assert value("matgptq_generation_tokens_total", budget) == 10
    assert value("matgptq_prompt_tokens_total", {"precision": "unknown", "reason": "unknown"}) == 100
    assert value("matgptq_time_to_first_token_seconds_sum", budget) == 2.0
    assert value("matgptq_time_to_first_token_seconds_count", budget) == 2
    assert value("matgptq_time_per_output_token_seconds_sum", budget) == 1.0
    assert value("matgptq_e2e_request_latency_seconds_sum", budget) == 6.0
    assert value("matgptq_queue_time_seconds_sum", budget) == 0.5
    assert value("matgptq_time_to_first_token_seconds_sum", unknown) == 1.0
    assert value("matgptq_time_per_output_token_seconds_count", unknown) is None
    assert value("matgptq_time_to_first_token_seconds_count", {"precision": "unknown", "reason": "unknown"}) is None


def test_prefix_cache_hits_are_counted_by_precision_where_vllm_says_them(registry, joined):
    joined.enabled = True
    joined.begin("a", "4")
    record(
        finished("cmpl-a-0", num_prompt_tokens=40, num_generation_tokens=1, num_cached_tokens=32),
        finished("cmpl-a-1", num_prompt_tokens=10, num_generation_tokens=1, num_cached_tokens=0),
        SimpleNamespace(request_id="cmpl-a-2", num_prompt_tokens=100),
    )
    assert registry.get_sample_value("matgptq_prefix_cache_queries_total", {"precision": "4"}) == 50
    assert registry.get_sample_value("matgptq_prefix_cache_hits_total", {"precision": "4"}) == 32


def test_every_step_reaches_the_observer_with_its_engine(joined, observer):
    config = SimpleNamespace(cache_config=SimpleNamespace(num_gpu_blocks=100, block_size=16))
    logger = PrecisionStatLogger(config, 0)
    logger.record(SchedulerStats(num_running_reqs=2), None)
    assert observer.load.running == 0  # nobody listens: this may be any vLLM server
    steps = []
    observer.listen(steps.append)
    logger.record(SchedulerStats(num_running_reqs=2, kv_cache_usage=0.5), None, engine_idx=3)
    assert [(step.engine_index, step.running, step.context_tokens) for step in steps] == [(3, 2, 800)]


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (None, None),
        (SimpleNamespace(cache_config=SimpleNamespace(num_gpu_blocks=None, block_size=16)), None),
        (
            SimpleNamespace(
                cache_config=SimpleNamespace(num_gpu_blocks=64, block_size=16),
                parallel_config=SimpleNamespace(data_parallel_size=2),
            ),
            512,
        ),
    ],
)
def test_the_size_of_the_cache_is_told_if_vllm_has_it(config, expected):
    assert kv_cache_tokens(config) == expected


def test_a_failure_in_booking_stops_neither_the_engine_nor_the_next_sequence(registry, joined, caplog):
    def broken(prompt, generated):
        raise RuntimeError("broken")

    joined.enabled = True
    joined.begin("a", "4", RequestDetails("auto", ended=broken))
    record(*[finished("chatcmpl-a", num_prompt_tokens=1, num_generation_tokens=1)] * 3)
    assert registry.get_sample_value("matgptq_prompt_tokens_total", {"precision": "4", "reason": "auto"}) == 3
    assert [entry.levelname for entry in caplog.records] == ["ERROR"]


def test_in_a_server_without_a_replica_nothing_is_recorded(registry, joined):
    record(finished("cmpl-a-0", num_prompt_tokens=7, num_generation_tokens=5))
    assert registry.get_sample_value("matgptq_prompt_tokens_total", {"precision": "unknown", "reason": "unknown"}) is None


def test_a_step_without_statistics_is_fine(joined):
    joined.enabled = True
    PrecisionStatLogger(None).record(None, None)


def test_statistics_of_a_release_with_fewer_fields_count_as_unknown(registry, joined):
    joined.enabled = True
    record(SimpleNamespace(num_prompt_tokens=2, e2e_latency=None))
    assert registry.get_sample_value("matgptq_prompt_tokens_total", {"precision": "unknown", "reason": "unknown"}) == 2
    assert finished_sequence(SimpleNamespace(e2e_latency=-1.0)) == FinishedSequence(0, 0, 0.0, 0.0, 0.0, 0.0)


def test_what_the_replica_holds_is_shown_and_its_counters_start_at_zero(registry, metrics, report):
    metrics.replica_loaded(Replica.from_reports([report], ["tiny"]))
    labels = {"default_precision": "8", "max_width": "8", "slice_rule": "nested"}
    assert registry.get_sample_value("matgptq_replica_info", labels) == 1
    zeros = [
        ("matgptq_generation_tokens_total", {"precision": "mix-3.0", "reason": "auto"}),
        ("matgptq_budget_outcomes_total", {"precision": "mix-3.0", "budget": "ttft", "outcome": "missed"}),
        ("matgptq_controller_switches_total", {"direction": "down"}),
    ]
    assert [registry.get_sample_value(name, labels) for name, labels in zeros] == [0, 0, 0]
    # A model of which nothing is known has no error; 0 would look like a perfect one.
    assert registry.get_sample_value("matgptq_latency_model_error_ratio", {"statistic": "mean"}) is None


def test_what_the_controller_does_is_shown(registry, metrics):
    metrics.model_error(0.5)
    metrics.model_error(0.25)
    metrics.switched("down")
    metrics.resident(codes=1000, scales=10)
    metrics.budget_outcome("4", "tpot", met=False)
    metrics.predicted("4", predicted_s=0.02, actual_s=0.03)
    value = registry.get_sample_value
    assert value("matgptq_latency_model_error_ratio", {"statistic": "mean"}) == 0.25
    assert value("matgptq_controller_switches_total", {"direction": "down"}) == 1
    assert value("matgptq_resident_bytes", {"kind": "codes"}) == 1000
    assert value("matgptq_resident_bytes", {"kind": "scales"}) == 10
    assert value("matgptq_budget_outcomes_total", {"precision": "4", "budget": "tpot", "outcome": "missed"}) == 1
    assert value("matgptq_prediction_ratio_sum", {"precision": "4", "budget": "tpot"}) == pytest.approx(1.5)


def test_tenants_have_series_of_their_own_up_to_a_bound(registry, metrics):
    for index in range(MAX_TENANTS + 5):
        metrics.tenant_request(f"t{index}", "4")
    metrics.tenant_rejected("t0", "quota")
    metrics.tenant_rejected("late", "quota")
    metrics.tenant_tokens("t1", "2", prompt=3, generated={"2": 4})
    metrics.tenant_tokens("late", "2", prompt=3, generated={"2": 3, "4": 1})
    value = registry.get_sample_value
    assert value("matgptq_tenant_requests_total", {"tenant": f"t{MAX_TENANTS - 1}", "precision": "4"}) == 1
    assert value("matgptq_tenant_requests_total", {"tenant": "other", "precision": "4"}) == 5
    assert value("matgptq_tenant_rejected_requests_total", {"tenant": "t0", "reason": "quota"}) == 1
    assert value("matgptq_tenant_rejected_requests_total", {"tenant": "other", "reason": "quota"}) == 1
    assert value("matgptq_tenant_prompt_tokens_total", {"tenant": "t1", "precision": "2"}) == 3
    assert value("matgptq_tenant_generation_tokens_total", {"tenant": "other", "precision": "2"}) == 3
    assert value("matgptq_tenant_generation_tokens_total", {"tenant": "other", "precision": "4"}) == 1
    assert value("matgptq_tenant_requests_total", {"tenant": "late", "precision": "4"}) is None


def test_the_number_of_series_has_the_documented_bound(registry, metrics, report):
    """Everything at once: what docs/observability.md says that a scrape may grow to, with 6 profiles and 3 tenants."""
    replica = Replica.from_reports([report], ["tiny"])
    metrics.replica_loaded(replica)
    precisions, reasons, tenants = [*replica.catalogue.profiles, "unknown"], [*REASONS, "unknown"], ["a", "b", "c"]
    sequence = FinishedSequence(1, 2, 1.0, 0.0, 0.5, 0.5, 1)
    for precision in precisions:
        for reason in reasons:
            metrics.sequence_finished(precision, sequence, reason)
        for budget in ("tpot", "ttft"):
            metrics.budget_outcome(precision, budget, True)
            metrics.budget_outcome(precision, budget, False)
            metrics.predicted(precision, 1.0, 1.0, budget)
        for tenant in tenants:
            metrics.tenant_request(tenant, precision)
            metrics.tenant_tokens(tenant, precision, 1, {precision: 1})
    for tenant in tenants:
        for rejection in REJECTIONS:
            metrics.tenant_rejected(tenant, rejection)
    lines = [line for line in generate_latest(registry).decode().splitlines() if line[0] != "#" and "_created{" not in line]
    pairs = len(precisions) * len(reasons)
    sequences = pairs * (2 + 3 * 22 + 20)
    by_precision = len(precisions) * (2 + 4 + 2 * 17)
    by_tenant = len(tenants) * (3 * len(precisions) + len(REJECTIONS))
    assert len(lines) == sequences + by_precision + by_tenant + 3


def test_names_follow_prometheus(registry, metrics):
    metrics.request_ended("4", "header", 200)
    metrics.request_rejected("body")
    metrics.sequence_finished("4", FinishedSequence(1, 2, 1.0, 0.0, 0.5, 0.5))
    endings = {"counter": ("_total",), "histogram": ("_seconds", "_ratio"), "gauge": ("_info", "_ratio", "_bytes")}
    families = [line.split()[2:] for line in generate_latest(registry).decode().splitlines() if line.startswith("# TYPE")]
    for name, kind in families:
        assert name.startswith("matgptq_")
        if not name.endswith("_created"):
            assert name.endswith(endings[kind])


def test_they_work_with_several_api_processes(tmp_path, report):
    code = """
from prometheus_client import CollectorRegistry, generate_latest, multiprocess
from serve.metrics import FinishedSequence, precision_metrics
from serve.replica import Replica
import sys, json
metrics = precision_metrics()
metrics.replica_loaded(Replica.from_reports([json.loads(sys.argv[1])], ["tiny"]))
metrics.request_ended("4", "header", 200)
metrics.sequence_finished("4", FinishedSequence(1, 2, 1.0, 0.0, 0.5, 0.5))
metrics.resident(1000, 10)
metrics.model_error(0.125)
registry = CollectorRegistry()
multiprocess.MultiProcessCollector(registry)
print(generate_latest(registry).decode())
"""
    report = {**report, "profiles": ["4"], "default": "4", "max_width": 4}
    environment = {**os.environ, "PROMETHEUS_MULTIPROC_DIR": str(tmp_path)}
    for expected in ("1.0", "2.0"):
        done = subprocess.run(
            [sys.executable, "-c", code, json.dumps(report)], env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        assert f'matgptq_requests_total{{precision="4",reason="header",status="200"}} {expected}' in done.stdout
        assert f'matgptq_time_to_first_token_seconds_count{{precision="4",reason="unknown"}} {expected}' in done.stdout
        assert 'matgptq_replica_info{default_precision="4",max_width="4",slice_rule="nested"} 1.0' in done.stdout
        assert 'matgptq_resident_bytes{kind="codes"} 1000.0' in done.stdout
        assert 'matgptq_latency_model_error_ratio{statistic="mean"} 0.125' in done.stdout
