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
from vllm.v1.metrics.stats import FinishedRequestStats, IterationStats

import serve.stat_logger
from serve.metrics import FinishedSequence, PrecisionMetrics
from serve.replica import Replica
from serve.request_ids import RequestPrecisions
from serve.stat_logger import PrecisionStatLogger, finished_sequence


@pytest.fixture
def registry():
    return CollectorRegistry()


@pytest.fixture
def metrics(registry):
    return PrecisionMetrics(registry)


@pytest.fixture
def joined(monkeypatch, metrics):
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
    joined.begin("a", "4")
    joined.begin("b", "2")
    times = {"e2e_latency": 3.0, "queued_time": 0.25, "decode_time": 2.0, "mean_time_per_output_token": 0.5}
    record(
        finished("cmpl-a-0", num_prompt_tokens=7, num_generation_tokens=5, **times),
        finished("cmpl-a-1", num_prompt_tokens=3, num_generation_tokens=5, **times),
        finished("chatcmpl-b", num_prompt_tokens=1, num_generation_tokens=1, e2e_latency=1.0),
        finished("somebody", num_prompt_tokens=100, num_generation_tokens=0),
    )
    value = registry.get_sample_value
    assert value("matgptq_prompt_tokens_total", {"precision": "4"}) == 10
    assert value("matgptq_generation_tokens_total", {"precision": "4"}) == 10
    assert value("matgptq_prompt_tokens_total", {"precision": "unknown"}) == 100
    assert value("matgptq_time_to_first_token_seconds_sum", {"precision": "4"}) == 2.0
    assert value("matgptq_time_to_first_token_seconds_count", {"precision": "4"}) == 2
    assert value("matgptq_time_per_output_token_seconds_sum", {"precision": "4"}) == 1.0
    assert value("matgptq_e2e_request_latency_seconds_sum", {"precision": "4"}) == 6.0
    assert value("matgptq_queue_time_seconds_sum", {"precision": "4"}) == 0.5
    assert value("matgptq_time_to_first_token_seconds_sum", {"precision": "2"}) == 1.0
    assert value("matgptq_time_per_output_token_seconds_count", {"precision": "2"}) is None
    assert value("matgptq_time_to_first_token_seconds_count", {"precision": "unknown"}) is None


def test_in_a_server_without_a_replica_nothing_is_recorded(registry, joined):
    record(finished("cmpl-a-0", num_prompt_tokens=7, num_generation_tokens=5))
    assert registry.get_sample_value("matgptq_prompt_tokens_total", {"precision": "unknown"}) is None


def test_a_step_without_statistics_is_fine(joined):
    joined.enabled = True
    PrecisionStatLogger(None).record(None, None)


def test_statistics_of_a_release_with_fewer_fields_count_as_unknown(registry, joined):
    joined.enabled = True
    record(SimpleNamespace(num_prompt_tokens=2, e2e_latency=None))
    assert registry.get_sample_value("matgptq_prompt_tokens_total", {"precision": "unknown"}) == 2
    assert finished_sequence(SimpleNamespace(e2e_latency=-1.0)) == FinishedSequence(0, 0, 0.0, 0.0, 0.0, 0.0)


def test_what_the_replica_holds_is_shown_and_its_counters_start_at_zero(registry, metrics, report):
    metrics.replica_loaded(Replica.from_reports([report], ["tiny"]))
    labels = {"default_precision": "8", "max_width": "8", "slice_rule": "nested"}
    assert registry.get_sample_value("matgptq_replica_info", labels) == 1
    assert registry.get_sample_value("matgptq_generation_tokens_total", {"precision": "mix-3.0"}) == 0


def test_names_follow_prometheus(registry, metrics):
    metrics.request_ended("4", "header", 200)
    metrics.request_rejected("body")
    metrics.sequence_finished("4", FinishedSequence(1, 2, 1.0, 0.0, 0.5, 0.5))
    families = [line.split()[2:] for line in generate_latest(registry).decode().splitlines() if line.startswith("# TYPE")]
    for name, kind in families:
        assert name.startswith("matgptq_")
        if not name.endswith("_created"):
            assert {"counter": "_total", "histogram": "_seconds", "gauge": "_info"}[kind] == "_" + name.rpartition("_")[2]


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
        assert f'matgptq_time_to_first_token_seconds_count{{precision="4"}} {expected}' in done.stdout
        assert 'matgptq_replica_info{default_precision="4",max_width="4",slice_rule="nested"} 1.0' in done.stdout
