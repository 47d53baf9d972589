"""Text file -> windows of tokens."""

import logging
from pathlib import Path

import torch
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from matgptq_vllm.core.errors import InputError


def load_tokenizer(directory: Path) -> PreTrainedTokenizerBase:
    """The tokenizer in a model folder; InputError if there is none that can be loaded."""
    try:
        return AutoTokenizer.from_pretrained(directory, local_files_only=True)
    except Exception as error:  # transformers raises whatever its parsers raise
        raise InputError(
            f"{directory}: its tokenizer cannot be loaded ({_first_line(error)}); copy the tokenizer files of the model there"
        ) from error


def read_text(path: Path) -> str:
    """The text of a UTF-8 file; InputError if it is not one."""
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise InputError(
            f"{path} is not UTF-8 text: byte {error.start} is 0x{error.object[error.start]:02x}; convert it to UTF-8"
        ) from error
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}); give a UTF-8 text file") from error


def encode_text(path: Path, tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> torch.Tensor:
    """Tokens of a text file, without special tokens.

    Args:
        vocab_size: rows of the model's embedding; a token beyond them means that the tokenizer is another model's.

    Returns:
        int64 [num_tokens].
    """
    # A text is longer than any context; the warning about that would only mislead.
    logging.getLogger("transformers.tokenization_utils_base").setLevel(logging.ERROR)
    tokens = torch.tensor(tokenizer(read_text(path), add_special_tokens=False)["input_ids"], dtype=torch.int64)
    if tokens.numel() and int(tokens.max()) >= vocab_size:
        raise InputError(
            f"the tokenizer makes token {int(tokens.max())} of {path}, but the model knows {vocab_size} tokens; "
            "the tokenizer does not belong to this model"
        )
    return tokens


def sample_windows(tokens: torch.Tensor, num_samples: int, seq_len: int, seed: int, source: Path) -> torch.Tensor:
    """Windows that do not overlap, drawn without replacement from the whole text.

    Args:
        tokens: int64 [num_tokens].
        source: where the tokens come from, for messages.

    Returns:
        int64 [num_samples, seq_len].

    Raises:
        InputError: fewer than num_samples * seq_len tokens.
    """
    windows = _whole_windows(tokens, seq_len)
    if len(windows) < num_samples:
        raise InputError(
            f"{source} has {tokens.numel()} tokens; {num_samples} windows of {seq_len} need {num_samples * seq_len}. "
            + (
                f"Give more text, or at most --num-samples {len(windows)}"
                if len(windows)
                else f"Give more text: one window alone needs {seq_len} tokens"
            )
        )
    order = torch.randperm(len(windows), generator=torch.Generator().manual_seed(seed))
    return windows[order[:num_samples]].contiguous()


def leading_windows(tokens: torch.Tensor, seq_len: int, limit: int | None, source: Path) -> torch.Tensor:
    """The text cut into windows from its beginning; an incomplete last window is dropped.

    Args:
        tokens: int64 [num_tokens].
        limit: at most this many windows; None for all.

    Returns:
        int64 [num_windows, seq_len].

    Raises:
        InputError: fewer than ``seq_len`` tokens.
    """
    windows = _whole_windows(tokens, seq_len)
    if not len(windows):
        raise InputError(
            f"{source} has {tokens.numel()} tokens; one window needs {seq_len}. Give more text or a smaller --seq-len"
        )
    return windows[:limit]


def _whole_windows(tokens: torch.Tensor, seq_len: int) -> torch.Tensor:
    count = tokens.numel() // seq_len
    return tokens[: count * seq_len].view(count, seq_len)


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"
