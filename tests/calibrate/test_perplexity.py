import math

import pytest
import torch

from calibrate.evaluate import perplexity
from calibrate.evaluate.perplexity import measure_perplexity
from calibrate.model import load_model


@pytest.mark.parametrize("logits_per_batch", [1 << 25, 1])
def test_perplexity_is_that_of_the_likelihood_of_every_token_but_the_first(llama_dir, monkeypatch, logits_per_batch):
    monkeypatch.setattr(perplexity, "LOGITS_PER_BATCH", logits_per_batch)
    model = load_model(llama_dir, torch.float32)
    windows = torch.randint(0, 256, (3, 17), generator=torch.Generator().manual_seed(0))
    total = 0.0
    for window in windows:
        for position in range(1, 17):
            logits = model(window[None, :position]).logits[0, -1].double()
            total -= logits.log_softmax(0)[window[position]].item()
    measured = measure_perplexity(model, windows, "test")
    assert measured.tokens == 48
    assert measured.perplexity == pytest.approx(math.exp(total / 48), rel=1e-5)
