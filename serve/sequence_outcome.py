"""What one finished sequence means for the metrics, for its budgets, for its tenant's usage and for its quota."""

from serve.metrics import FinishedSequence, PrecisionMetrics
from serve.request_details import EndedSequence, RequestDetails


def observe_outcome(
    metrics: PrecisionMetrics, precision: str, details: RequestDetails | None, sequence: FinishedSequence
) -> None:
    """Book ``sequence``, of a request computed at ``precision``.

    A budget for tokens after the first is neither met nor missed by a sequence that has none.

    Args:
        details: what was decided at admission; None if it cannot be told.
    """
    if details is None:
        metrics.sequence_finished(precision, sequence)
        return
    generated = None if details.flight is None else details.flight.split(sequence.num_generation_tokens)
    metrics.sequence_finished(precision, sequence, details.reason, generated)
    times = (
        ("tpot", details.budget_tpot_ms, details.predicted_tpot_ms, sequence.time_per_output_token),
        ("ttft", details.budget_ttft_ms, details.predicted_ttft_ms, sequence.time_to_first_token),
    )
    for budget, limit_ms, predicted_ms, actual_s in times:
        if actual_s is None:
            continue
        if limit_ms is not None:
            metrics.budget_outcome(precision, budget, actual_s * 1000 <= limit_ms)
        if predicted_ms is not None:
            metrics.predicted(precision, predicted_ms / 1000, actual_s, budget)
    if details.tenant is not None:
        metrics.tenant_tokens(
            details.tenant, precision, sequence.num_prompt_tokens, generated or {precision: sequence.num_generation_tokens}
        )
    if details.ended is not None:
        seconds = sequence.time_per_output_token
        tpot_ms = None if seconds is None else seconds * 1000
        cached = sequence.num_cached_tokens or 0
        details.ended(EndedSequence(sequence.num_prompt_tokens, sequence.num_generation_tokens, tpot_ms, cached))
