"""KL divergence of a model's next-token distributions from the original's, per window of text."""

import torch
from transformers import PreTrainedModel

ROWS = 256
"""Positions whose distributions are compared at once: some tens of MiB of float32 stay in a CPU's cache or near it."""

LOGITS_PER_BATCH = 1 << 24
"""Bound on batch * seq_len * vocabulary of one forward pass: 64 MiB of float32 logits."""


@torch.no_grad()
def next_token_logits(model: PreTrainedModel, batch: torch.Tensor) -> torch.Tensor:
    """Logits [batch, seq_len - 1, vocab] for every position whose next token is in its window.

    Args:
        batch: int64 [batch, seq_len], on the model's device.
    """
    return model(batch, use_cache=False).logits[:, :-1]


def log_probabilities(logits: torch.Tensor) -> torch.Tensor:
    """float16 [..., vocab] log-probabilities of ``logits`` [..., vocab]; computed in float32."""
    result = torch.empty(logits.shape, dtype=torch.float16, device=logits.device)
    for rows, out in zip(logits.flatten(0, -2).split(ROWS), result.flatten(0, -2).split(ROWS), strict=True):
        out.copy_(torch.log_softmax(rows.float(), dim=-1))
    return result


def mean_divergence(target: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    """Mean over positions of KL(target || softmax(logits)) in nats.

    Computed as sum(p log(p / q) - p + q), which equals KL for normalised p and whose error from rounding p to float16
    is of second order.

    Args:
        target: float16 [positions, vocab], log-probabilities of the original.
        logits: floating [positions, vocab].

    Returns:
        float64 scalar.
    """
    total = torch.zeros((), dtype=torch.float64, device=logits.device)
    for wanted, rows in zip(target.split(ROWS), logits.split(ROWS), strict=True):
        log_p = wanted.float()
        p = log_p.exp()
        ratio = log_p.sub_(torch.log_softmax(rows.float(), dim=-1)).sub_(1)
        total += ((p * ratio).sum(dim=-1) + 1).double().sum()
    return total / len(target)


def windows_per_batch(vocab_size: int, seq_len: int) -> int:
    """Windows in one forward pass."""
    return max(1, LOGITS_PER_BATCH // (seq_len * vocab_size))
