"""``python -m calibrate.evaluate.switching PARENT --text FILE``: what it costs to change precision in the middle of a text.

Each window is cut in two. The keys and values of the first part are computed at one profile, and the second part is scored
at another, which attends to them: as a server does with requests that change while they run.
"""

import argparse
import copy
import math
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from calibrate.data import encode_text, leading_windows, load_tokenizer
from calibrate.evaluate.perplexity import LOGITS_PER_BATCH
from calibrate.evaluate.report import markdown_table
from calibrate.evaluate.resident_parent import ResidentParent
from calibrate.evaluate.sliced_model import load_profile_model, set_profile
from matgptq_vllm.core.errors import MatGPTQError
from matgptq_vllm.core.profile import Profile


@torch.no_grad()
def measure_switching(
    reader: ResidentParent, profiles: Sequence[Profile], windows: torch.Tensor, prefix: int
) -> dict[tuple[str, str], float]:
    """(profile of the prefix, profile of the continuation) -> perplexity of the continuation.

    Args:
        windows: int64 [num_windows, seq_len].
        prefix: tokens of each window that are computed at the prefix's profile; 0 < prefix < seq_len - 1. The continuation's
            first token is not scored: the prefix predicts it.
    """
    model: Any = load_profile_model(reader, profiles[0])
    batches = list(_batches(windows, model.config.get_text_config().vocab_size))
    found = {}
    for before in profiles:
        set_profile(model, reader, before)
        caches = [model(batch[:, :prefix], use_cache=True).past_key_values for batch in batches]
        for after in profiles:
            set_profile(model, reader, after)
            total = sum(
                _loss(model, batch[:, prefix:], copy.deepcopy(cache)) for batch, cache in zip(batches, caches, strict=True)
            )
            found[before.name, after.name] = math.exp(total / (windows.shape[0] * (windows.shape[1] - prefix - 1)))
            print(f"prefix {before.name}, continuation {after.name}: {found[before.name, after.name]:.3f}", file=sys.stderr)
    return found


def table(found: dict[tuple[str, str], float]) -> str:
    """A row per profile of the prefix, a column per profile of the continuation, in Markdown."""
    befores = list(dict.fromkeys(before for before, _ in found))
    afters = list(dict.fromkeys(after for _, after in found))
    rows = [["prefix at", *(f"continuation at {after}" for after in afters)]]
    rows += [[before, *(f"{found[before, after]:.3f}" for after in afters)] for before in befores]
    return markdown_table(rows)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure what the command line asks for, and print the table."""
    parser = argparse.ArgumentParser(
        prog="python -m calibrate.evaluate.switching",
        description="Perplexity of continuations whose prefix was computed at another precision.",
    )
    parser.add_argument("parent", type=Path, help="folder of a parent")
    parser.add_argument("--text", type=Path, required=True, help="UTF-8 text that was not calibrated on")
    parser.add_argument("--profiles", default="2,3,4,8", help="widths or names of the parent's table (default: %(default)s)")
    parser.add_argument("--seq-len", type=int, default=512, help="tokens per window (default: %(default)s)")
    parser.add_argument("--prefix", type=int, help="tokens of them in the prefix (default: half)")
    parser.add_argument("--limit-windows", type=int, default=64, help="first windows to measure (default: %(default)s)")
    given = parser.parse_args(arguments)
    prefix = given.seq_len // 2 if given.prefix is None else given.prefix
    if not 0 < prefix < given.seq_len - 1 or given.limit_windows < 1:
        parser.error(
            f"a prefix of {prefix} in windows of {given.seq_len} leaves nothing to score; need 0 < prefix < seq_len - 1"
        )
    try:
        reader = ResidentParent(given.parent)
        profiles = [reader.profile(name) for name in given.profiles.split(",")]
        tokenizer = load_tokenizer(given.parent)
        tokens = encode_text(given.text, tokenizer, len(tokenizer))
        windows = leading_windows(tokens, given.seq_len, given.limit_windows, given.text)
        print(table(measure_switching(reader, profiles, windows, prefix)))
    except MatGPTQError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def _batches(windows: torch.Tensor, vocab_size: int) -> Iterator[torch.Tensor]:
    yield from windows.split(max(1, LOGITS_PER_BATCH // (windows.shape[1] * vocab_size)))


def _loss(model: Any, tokens: torch.Tensor, cache: Any) -> float:
    """Sum of negative log-likelihoods, in nats, of ``tokens`` [batch, length] but the first, after what ``cache`` holds."""
    logits = model(tokens, past_key_values=cache, use_cache=True).logits[:, :-1].float()
    losses = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction="none")
    return losses.double().sum().item()


if __name__ == "__main__":
    sys.exit(main())
