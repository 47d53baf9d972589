"""What a finished sequence is booked as."""

import pytest
from prometheus_client import CollectorRegistry

from serve.metrics import FinishedSequence, PrecisionMetrics
from serve.request_details import RequestDetails
from serve.sequence_outcome import observe_outcome

SEQUENCE = FinishedSequence(7, 5, e2e_latency=2.5, queued_time=0.25, decode_time=2.0, mean_time_per_output_token=0.5)
"""First token after 500 ms, 500 ms for each of the others."""


@pytest.fixture
def registry():
    return CollectorRegistry()


@pytest.fixture
def observe(registry):
    metrics = PrecisionMetrics(registry)
    return lambda details, sequence=SEQUENCE: observe_outcome(metrics, "4", details, sequence)


def outcomes(registry):
    return {
        (sample.labels["precision"], sample.labels["budget"], sample.labels["outcome"]): sample.value
        for metric in registry.collect()
        for sample in metric.samples
        if sample.name == "matgptq_budget_outcomes_total"
    }


@pytest.mark.parametrize(
    ("tpot_ms", "ttft_ms", "expected"),
    [
        (500, 500, {("4", "tpot", "met"): 1, ("4", "ttft", "met"): 1}),
        (499, 499, {("4", "tpot", "missed"): 1, ("4", "ttft", "missed"): 1}),
        (None, 501, {("4", "ttft", "met"): 1}),
        (None, None, {}),
    ],
)
def test_a_budget_is_met_up_to_its_limit(registry, observe, tpot_ms, ttft_ms, expected):
    observe(RequestDetails("budget", budget_tpot_ms=tpot_ms, budget_ttft_ms=ttft_ms))
    assert outcomes(registry) == expected


def test_what_did_not_happen_meets_and_misses_nothing(registry, observe):
    details = RequestDetails("budget", None, 1.0, 1.0, 1.0, 1.0)
    observe(details, FinishedSequence(7, 0, 2.5, 2.5, 0.0, 0.0))
    assert outcomes(registry) == {}
    observe(details, FinishedSequence(7, 1, 2.5, 2.5, 0.0, 0.0))
    assert outcomes(registry) == {("4", "ttft", "missed"): 1}
    assert registry.get_sample_value("matgptq_prediction_ratio_count", {"precision": "4", "budget": "tpot"}) is None


def test_predictions_are_compared_with_what_came(registry, observe):
    observe(RequestDetails("auto", predicted_tpot_ms=250, predicted_ttft_ms=1000))
    observe(RequestDetails("auto", predicted_tpot_ms=0))
    value = registry.get_sample_value
    assert value("matgptq_prediction_ratio_sum", {"precision": "4", "budget": "tpot"}) == 2.0
    assert value("matgptq_prediction_ratio_sum", {"precision": "4", "budget": "ttft"}) == 0.5
    assert value("matgptq_prediction_ratio_count", {"precision": "4", "budget": "tpot"}) == 1


def test_usage_goes_to_the_tenant_and_to_its_quota(registry, observe):
    settled = []
    observe(RequestDetails("tenant", tenant="acme", ended=settled.append))
    labels = {"tenant": "acme", "precision": "4"}
    assert registry.get_sample_value("matgptq_tenant_prompt_tokens_total", labels) == 7
    assert registry.get_sample_value("matgptq_tenant_generation_tokens_total", labels) == 5
    assert [(end.num_prompt_tokens, end.num_generation_tokens) for end in settled] == [(7, 5)]
    assert settled[0].tpot_ms == pytest.approx(1000 * SEQUENCE.time_per_output_token)
    by_reason = {"precision": "4", "reason": "tenant"}
    assert registry.get_sample_value("matgptq_generation_tokens_total", by_reason) == 5


def test_a_sequence_of_which_nothing_is_known_still_counts(registry, observe):
    observe(None)
    by_reason = {"precision": "4", "reason": "unknown"}
    assert registry.get_sample_value("matgptq_prompt_tokens_total", by_reason) == 7
