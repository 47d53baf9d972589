"""Fitness of a genome: mean KL divergence per token from the original model, over windows of text."""

import math
from collections.abc import Callable, Sequence

import torch

from calibrate.evaluate.original import Original
from calibrate.search.divergence import log_probabilities, mean_divergence, next_token_logits, windows_per_batch
from calibrate.search.journal import Journal
from calibrate.search.units import Genome
from calibrate.search.weights import SwitchedModel
from matgptq_vllm.core.errors import InputError

Measure = Callable[[Genome, Sequence[int]], list[float]]
"""From a genome and indices of windows to the divergence on each."""


class JournaledFitness:
    """Fitness from measurements that are made once, and kept in a journal.

    Args:
        on_windows: called with the number of measurements, of one genome on one window, that were asked for the first time.
    """

    def __init__(self, measure: Measure, journal: Journal, on_windows: Callable[[int], None] = lambda count: None):
        self._measure = measure
        self._journal = journal
        self._on_windows = on_windows
        self._asked: set[tuple[Genome, int]] = set()

    def __call__(self, genome: Genome, windows: Sequence[int]) -> float:
        """Mean divergence of ``genome`` over the windows of these indices, repeated ones counted as often, in nats per token.

        Raises:
            InputError: a divergence is NaN or infinite.
        """
        held = self._journal.measured.get(genome, {})
        missing = [window for window in dict.fromkeys(windows) if window not in held]
        if missing:
            values = self._measure(genome, missing)
            if not all(map(math.isfinite, values)):
                raise InputError(
                    "the divergence from the original model is NaN or infinite; check the parent with `matgptq inspect DIR "
                    "--verify`, and the original model, then calibrate again"
                )
            self._journal.add(genome, dict(zip(missing, values, strict=True)))
            held = self._journal.measured[genome]
        asked = {(genome, window) for window in windows} - self._asked
        self._asked |= asked
        self._on_windows(len(asked))
        return sum(held[window] for window in windows) / len(windows)


class Targets:
    """The original model's distributions on the search text: kept as far as memory is granted.

    Args:
        original: the original, after it has run over the windows.
        num_windows: windows that it ran over.
        kept_bytes: bound on log-probabilities kept; beyond it, the original's output head computes them again when needed.
    """

    def __init__(self, original: Original, num_windows: int, kept_bytes: int):
        self._original = original
        self._kept: list[torch.Tensor] = []
        left = kept_bytes
        for window in range(num_windows):
            target = self._compute(window)
            left -= target.nbytes
            if left < 0:
                break
            self._kept.append(target)

    def log_probabilities(self, window: int) -> torch.Tensor:
        """float16 [seq_len - 1, vocab] of one window."""
        return self._kept[window] if window < len(self._kept) else self._compute(window)

    def _compute(self, window: int) -> torch.Tensor:
        return log_probabilities(self._original.logits(window, 1)[0])


class DivergenceFromOriginal:
    """Measures genomes of one parent: a ``Measure``.

    Args:
        windows: int64 [num_windows, seq_len], the ones that ``targets`` are of, on the model's device.
    """

    def __init__(self, model: SwitchedModel, targets: Targets, windows: torch.Tensor):
        self._model = model
        self._targets = targets
        self._windows = windows

    def __call__(self, genome: Genome, windows: Sequence[int]) -> list[float]:
        """Divergence of ``genome`` on each of ``windows``, in nats per token."""
        model = self._model.switch(genome)
        batch_size = windows_per_batch(model.config.get_text_config().vocab_size, self._windows.shape[1])
        values: list[torch.Tensor] = []
        for batch in torch.tensor(windows, device=self._windows.device).split(batch_size):
            logits = next_token_logits(model, self._windows[batch])
            for row, window in zip(logits, batch.tolist(), strict=True):
                values.append(mean_divergence(self._targets.log_probabilities(window), row))
        return torch.stack(values).tolist()
