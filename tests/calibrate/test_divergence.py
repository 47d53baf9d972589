"""The original, its logits kept as hidden states, and a slice's distance to it."""

import math

import pytest
import torch

from calibrate.evaluate import original as original_module
from calibrate.evaluate import perplexity
from calibrate.evaluate.divergence import Divergence
from calibrate.evaluate.original import Original
from calibrate.evaluate.perplexity import measure_perplexity
from calibrate.model import load_model
from matgptq_vllm.core.errors import InputError

SEQ_LEN = 17


@pytest.fixture
def windows():
    return torch.randint(0, 256, (5, SEQ_LEN), generator=torch.Generator().manual_seed(0))


def noisy(directory):
    model = load_model(directory, torch.float32)
    generator = torch.Generator().manual_seed(1)
    for parameter in model.model.layers.parameters():
        parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.01)
    return model


@pytest.mark.parametrize("host_bytes", [original_module.HOST_BYTES, 0], ids=["in memory", "in a file"])
def test_the_original_gives_its_logits_again_after_its_blocks_are_gone(family_dir, windows, monkeypatch, host_bytes):
    monkeypatch.setattr(original_module, "HOST_BYTES", host_bytes)
    monkeypatch.setattr(perplexity, "LOGITS_PER_BATCH", 2 * SEQ_LEN * 256)
    expected = load_model(family_dir, torch.float32)
    original = Original(load_model(family_dir, torch.float32), windows)
    assert original.perplexity == measure_perplexity(expected, windows, "test")
    assert original._model.model.layers[0].mlp.up_proj.weight.numel() == 0
    for start, count in ((0, 2), (3, 2), (4, 1)):
        logits = expected(windows[start : start + count]).logits[:, :-1]
        torch.testing.assert_close(original.logits(start, count), logits)


@pytest.mark.parametrize("windows_per_batch", [2, 5])
def test_divergence_is_the_mean_over_scored_tokens(llama_dir, windows, monkeypatch, windows_per_batch):
    monkeypatch.setattr(perplexity, "LOGITS_PER_BATCH", windows_per_batch * SEQ_LEN * 256)
    slice_model = noisy(llama_dir)
    p = load_model(llama_dir, torch.float32)(windows).logits[:, :-1].double().log_softmax(-1)
    q = slice_model(windows).logits[:, :-1].double().log_softmax(-1)
    divergence = Divergence(Original(load_model(llama_dir, torch.float32), windows), "test")
    measure_perplexity(slice_model, windows, "test", divergence.observe)
    assert divergence.kl == pytest.approx((p.exp() * (p - q)).sum(-1).mean().item(), rel=1e-4)
    agreement = (p.argmax(-1) == q.argmax(-1)).double().mean().item()
    assert divergence.top1_agreement == agreement
    assert 0 < agreement < 1


def test_the_original_is_no_distance_from_itself(llama_dir, windows):
    divergence = Divergence(Original(load_model(llama_dir, torch.float32), windows), "test")
    measure_perplexity(load_model(llama_dir, torch.float32), windows, "test", divergence.observe)
    assert divergence.kl == pytest.approx(0, abs=1e-6)
    assert divergence.top1_agreement == 1


def test_an_original_of_other_tokens_or_infinite_logits_is_refused(llama_dir, windows):
    divergence = Divergence(Original(load_model(llama_dir, torch.float32), windows), "profile 4")
    with pytest.raises(InputError, match="scores 256 tokens, the parent 255"):
        divergence.observe(0, torch.zeros(2, SEQ_LEN - 1, 255))
    with pytest.raises(InputError, match=r"profile 4: its KL divergence from the original is (inf|nan) in windows 3 to 4"):
        divergence.observe(3, torch.full((2, SEQ_LEN - 1, 256), 0.0).index_fill(2, torch.tensor([9]), -math.inf))
