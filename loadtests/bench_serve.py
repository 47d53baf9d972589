"""vLLM's own load generator, ``vllm bench serve``, as the load tests run it, and their tables."""

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def run(url: str, tokenizer: str, model: str | None, header: str, options: Sequence[str], target: Path) -> dict[str, Any]:
    """Put a load on ``url`` and return the generator's result, which stays in ``target``. Ends the program if it fails.

    Args:
        tokenizer: folder with the model's tokenizer.
        model: served model name, None for the first that the server lists.
        header: of every request, as ``NAME=VALUE``.
        options: what the load is.
    """
    target.unlink(missing_ok=True)
    command = [
        *(sys.executable, "-m", "vllm.entrypoints.cli.main", "bench", "serve", "--backend", "openai", "--base-url", url),
        *([] if model is None else ["--model", model, "--served-model-name", model]),
        *("--tokenizer", tokenizer, "--header", header, *options, "--ignore-eos", "--temperature", "0"),
        *("--disable-tqdm", "--save-result", "--result-dir", str(target.parent), "--result-filename", target.name),
    ]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode or not target.exists():
        sys.exit(f"loadtests: `{' '.join(command)}` failed with status {done.returncode}:\n{done.stdout[-2000:]}")
    result: dict[str, Any] = json.loads(target.read_text(encoding="utf-8"))
    return result


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """Rows of a table as lines, every column as wide as its widest cell."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)
