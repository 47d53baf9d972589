import math
import re

import pytest
import torch

from calibrate.evaluate import perplexity
from calibrate.evaluate.perplexity import measure_perplexity
from calibrate.model import load_model
from matgptq_vllm.core.errors import InputError


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


def test_the_observer_sees_the_logits_of_every_window_once(llama_dir, monkeypatch):
    monkeypatch.setattr(perplexity, "LOGITS_PER_BATCH", 2 * 17 * 256)
    model = load_model(llama_dir, torch.float32)
    windows = torch.randint(0, 256, (3, 17), generator=torch.Generator().manual_seed(0))
    seen = []
    measure_perplexity(model, windows, "test", lambda start, logits: seen.append((start, logits)))
    assert [start for start, _ in seen] == [0, 2]
    torch.testing.assert_close(torch.cat([logits for _, logits in seen]), model(windows).logits[:, :-1])


def test_logits_that_are_no_numbers_are_refused_by_name(llama_dir):
    model = load_model(llama_dir, torch.float32)
    model.get_parameter("model.norm.weight").data[3] = math.nan
    with pytest.raises(
        InputError, match=re.escape("profile mix-3.0: the model's logits are NaN or infinite in windows 0 to 1")
    ):
        measure_perplexity(model, torch.zeros(2, 9, dtype=torch.int64), "profile mix-3.0")
