"""How long models take to load, one after the other: ``python -m loadtests.engine.loading MODEL...``.

MODEL is a folder, or of a parent FOLDER@WIDTH to read the planes up to a width only. Each is loaded ``--repeats`` times by an
engine in a process of its own; the fastest counts, so that all files come from the page cache.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import Any

from loadtests.tables import aligned
from matgptq_vllm.core.precision import PARENT_WIDTH
from matgptq_vllm.core.replica import ReplicaOptions

MARK = "loaded: "


def load(model: str) -> dict[str, float]:
    """Load a model in this process.

    Returns:
        GiB of all parameters; seconds of vLLM's model loader, from its first file to weights in the layout of the kernels, and
        of the engine's start as a whole.
    """
    import torch
    from vllm import LLM
    from vllm.model_executor.model_loader.base_loader import BaseModelLoader

    original = BaseModelLoader.load_model
    found: dict[str, float] = {}

    def timed(loader: Any, *args: Any, **kwargs: Any) -> Any:
        began = time.perf_counter()
        loaded = original(loader, *args, **kwargs)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        size = sum(parameter.nbytes for parameter in loaded.parameters())
        found.update(gib=size / 2**30, load_s=time.perf_counter() - began)
        return loaded

    BaseModelLoader.load_model = timed  # type: ignore[method-assign]
    folder, _, width = model.partition("@")
    options: dict[str, Any] = {}
    if width:
        options = {
            "worker_cls": "matgptq_vllm.compat.worker.MatGPTQWorker",
            "scheduler_cls": "matgptq_vllm.compat.scheduler.MatGPTQScheduler",
            "additional_config": ReplicaOptions(max_width=int(width)).to_additional_config(),
        }
    began = time.perf_counter()
    LLM(folder, enforce_eager=True, max_model_len=256, max_num_seqs=8, **options)
    return {**found, "start_s": time.perf_counter() - began}


def main(arguments: Sequence[str] | None = None) -> int:
    """Load every model and print what it took; returns 1 if one could not be loaded."""
    parser = argparse.ArgumentParser(prog="python -m loadtests.engine.loading", description="How long models take to load.")
    parser.add_argument(
        "models", nargs="+", metavar="MODEL", help=f"folder, or FOLDER@WIDTH of a parent (of {PARENT_WIDTH} bits)"
    )
    parser.add_argument("--repeats", type=int, default=2, help="loads, of which the fastest counts (default: %(default)s)")
    parser.add_argument("--json", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    if given.json:
        print(MARK + json.dumps(load(given.models[0])), flush=True)
        # Engines end slowly; what was to be known is printed.
        os._exit(0)
    # The engine's loader has to be in the process that asks for it.
    environment = {**os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    rows = [["model", "GiB", "load, s", "GiB/s", "start, s"]]
    for model in given.models:
        found = []
        for _ in range(given.repeats):
            command = [sys.executable, "-m", "loadtests.engine.loading", model, "--json"]
            done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
            lines = [line for line in done.stdout.splitlines() if line.startswith(MARK)]
            if not lines:
                print(f"loadtests: {model} was not loaded:\n{(done.stdout + done.stderr)[-3000:]}", file=sys.stderr)
                return 1
            found.append(json.loads(lines[0].removeprefix(MARK)))
        best = min(found, key=lambda one: one["load_s"])
        rows.append(
            [model, *(f"{value:.2f}" for value in (best["gib"], best["load_s"], best["gib"] / best["load_s"], best["start_s"]))]
        )
    print(aligned(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
