"""Perplexity of a causal language model over windows of text."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from tqdm import tqdm
from transformers import PreTrainedModel

from matgptq_vllm.core.errors import InputError

LOGITS_PER_BATCH = 1 << 25
"""Bound on batch * seq_len * vocabulary: 128 MiB of float32 logits."""

Observer = Callable[[int, torch.Tensor], None]
"""Called per batch with the index of its first window and its logits, float32 [batch, seq_len - 1, vocabulary]: logits at
position i are those that score token i + 1."""


@dataclass(frozen=True)
class Perplexity:
    """A measurement."""

    perplexity: float
    """exp of the mean negative log-likelihood per scored token, in nats."""

    tokens: int
    """Scored tokens."""


@torch.no_grad()
def measure_perplexity(
    model: PreTrainedModel, windows: torch.Tensor, label: str, observe: Observer | None = None
) -> Perplexity:
    """Perplexity of ``model``, every window seen alone; the first token of each is not scored.

    Args:
        windows: int64 [num_windows, seq_len], seq_len at least 2.
        label: what is being measured, for the progress bar and messages.
        observe: shown the logits of every batch.

    Raises:
        InputError: the model gives logits that are NaN or infinite.
    """
    num_windows, seq_len = windows.shape
    vocab_size = model.config.get_text_config().vocab_size
    batch_size = max(1, LOGITS_PER_BATCH // (seq_len * vocab_size))
    total = 0.0
    with tqdm(total=num_windows, desc=f"measuring {label}", unit="window", leave=False, disable=None) as progress:
        for start in range(0, num_windows, batch_size):
            batch = windows[start : start + batch_size].to(model.device)
            logits = model(batch, use_cache=False).logits[:, :-1].float()
            losses = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten(), reduction="none")
            loss = losses.double().sum().item()
            if not math.isfinite(loss):
                where = f"windows {start} to {start + len(batch) - 1}"
                raise InputError(
                    f"{label}: the model's logits are NaN or infinite in {where}, so nothing can be measured; check the "
                    "parent with `matgptq inspect DIR --verify`, and the original model, then calibrate again"
                )
            total += loss
            if observe is not None:
                observe(start, logits)
            progress.update(len(batch))
    tokens = num_windows * (seq_len - 1)
    return Perplexity(math.exp(total / tokens), tokens)
