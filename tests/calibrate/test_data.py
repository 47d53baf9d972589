from pathlib import Path

import pytest
import torch

from calibrate.data import encode_text, leading_windows, load_tokenizer, read_text, sample_windows
from matgptq_vllm.core.errors import InputError

SOURCE = Path("book.txt")


def test_tokens_are_those_of_the_text_without_special_ones(llama_dir, tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("hello\nworld")
    tokenizer = load_tokenizer(llama_dir)
    tokens = encode_text(path, tokenizer, 256)
    assert tokens.dtype == torch.int64
    assert tokenizer.decode(tokens.tolist()) == "hello\nworld"


def test_a_tokenizer_of_another_model_is_refused(llama_dir, text_file):
    with pytest.raises(InputError, match="the model knows 10 tokens"):
        encode_text(text_file, load_tokenizer(llama_dir), 10)


def test_a_folder_without_tokenizer_is_refused(tmp_path):
    with pytest.raises(InputError, match="tokenizer cannot be loaded"):
        load_tokenizer(tmp_path)


def test_text_that_is_not_utf8_or_not_there_is_refused(tmp_path):
    path = tmp_path / "latin1.txt"
    path.write_bytes("caf\xe9".encode("latin-1"))
    with pytest.raises(InputError, match="byte 3 is 0xe9"):
        read_text(path)
    with pytest.raises(InputError, match=r"missing\.txt cannot be read \(No such file"):
        read_text(tmp_path / "missing.txt")


def test_sampled_windows_are_whole_distinct_and_decided_by_the_seed():
    tokens = torch.arange(107)
    windows = sample_windows(tokens, 6, 10, seed=1, source=SOURCE)
    assert windows.shape == (6, 10)
    assert torch.equal(windows, windows[:, :1] + torch.arange(10))
    assert len(set(windows[:, 0].tolist())) == 6
    assert (windows[:, 0] % 10 == 0).all()
    assert torch.equal(windows, sample_windows(tokens, 6, 10, seed=1, source=SOURCE))
    assert not torch.equal(windows, sample_windows(tokens, 6, 10, seed=2, source=SOURCE))


@pytest.mark.parametrize("num_tokens", [0, 9])
def test_text_shorter_than_a_window_is_refused_with_both_counts(num_tokens):
    with pytest.raises(
        InputError, match=rf"book.txt has {num_tokens} tokens; 2 windows of 10 need 20.*one window alone needs 10"
    ):
        sample_windows(torch.arange(num_tokens), 2, 10, seed=0, source=SOURCE)
    with pytest.raises(InputError, match=rf"book.txt has {num_tokens} tokens; one window needs 10"):
        leading_windows(torch.arange(num_tokens), 10, None, SOURCE)


def test_text_with_too_few_windows_is_refused_with_the_number_it_has():
    with pytest.raises(
        InputError, match=r"has 39 tokens; 4 windows of 10 need 40\. Give more text, or at most --num-samples 3"
    ):
        sample_windows(torch.arange(39), 4, 10, seed=0, source=SOURCE)


def test_leading_windows_drop_the_incomplete_one_and_stop_at_the_limit():
    assert torch.equal(leading_windows(torch.arange(25), 10, None, SOURCE), torch.arange(20).view(2, 10))
    assert leading_windows(torch.arange(25), 10, 1, SOURCE).shape == (1, 10)
