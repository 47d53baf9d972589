"""How far a slice is from the original: KL divergence and agreement of the most likely token."""

import math

import torch

from calibrate.evaluate.original import Original
from matgptq_vllm.core.errors import InputError


class Divergence:
    """Means over scored tokens; an observer of ``measure_perplexity`` of the slice, on the windows of ``original``.

    Args:
        original: what the slice is compared with.
        label: the slice, for messages.
    """

    def __init__(self, original: Original, label: str):
        self._original = original
        self._label = label
        self._kl = 0.0
        self._agreeing = 0
        self._tokens = 0

    def observe(self, start: int, logits: torch.Tensor) -> None:
        """Take in the logits of a batch of windows.

        Args:
            start: index of the first window.
            logits: of the slice, float32 [batch, seq_len - 1, vocabulary].
        """
        expected = self._original.logits(start, len(logits))
        if expected.shape != logits.shape:
            raise InputError(
                f"the original scores {expected.shape[-1]} tokens, the parent {logits.shape[-1]}; "
                "give as --original the model that the parent was calibrated from, or pass --no-original"
            )
        log_p, log_q = expected.log_softmax(-1), logits.log_softmax(-1)
        kl = (log_p.exp() * (log_p - log_q)).sum(-1).double().sum().item()
        if not math.isfinite(kl):
            raise InputError(
                f"{self._label}: its KL divergence from the original is {kl} in windows {start} to {start + len(logits) - 1}; "
                "some of the logits are infinite. Pass --no-original to measure perplexity alone"
            )
        self._kl += kl
        self._agreeing += int((expected.argmax(-1) == logits.argmax(-1)).sum())
        self._tokens += log_p.shape[0] * log_p.shape[1]

    @property
    def kl(self) -> float:
        """Mean of KL(original || slice), in nats; rounding may leave it a hair below 0."""
        return self._kl / self._tokens

    @property
    def top1_agreement(self) -> float:
        """Share of tokens, 0 to 1, whose most likely successor is the same in both."""
        return self._agreeing / self._tokens
