"""Perplexity of a causal language model over windows of text."""

import math
from dataclasses import dataclass

import torch
from tqdm import tqdm
from transformers import PreTrainedModel

LOGITS_PER_BATCH = 1 << 25
"""Bound on batch * seq_len * vocabulary: 128 MiB of float32 logits."""


@dataclass(frozen=True)
class Perplexity:
    """A measurement."""

    perplexity: float
    """exp of the mean negative log-likelihood per scored token, in nats."""

    tokens: int
    """Scored tokens."""


@torch.no_grad()
def measure_perplexity(model: PreTrainedModel, windows: torch.Tensor, label: str) -> Perplexity:
    """Perplexity of ``model``, every window seen alone; the first token of each is not scored.

    Args:
        windows: int64 [num_windows, seq_len], seq_len at least 2.
        label: what the progress bar says is being measured.
    """
    num_windows, seq_len = windows.shape
    vocab_size = model.config.get_text_config().vocab_size
    batch_size = max(1, LOGITS_PER_BATCH // (seq_len * vocab_size))
    total = 0.0
    with tqdm(total=num_windows, desc=f"perplexity at {label}", unit="window", leave=False, disable=None) as progress:
        for batch in windows.to(model.device).split(batch_size):
            logits = model(batch, use_cache=False).logits[:, :-1].float()
            losses = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten(), reduction="none")
            total += losses.double().sum().item()
            progress.update(len(batch))
    tokens = num_windows * (seq_len - 1)
    return Perplexity(math.exp(total / tokens), tokens)
