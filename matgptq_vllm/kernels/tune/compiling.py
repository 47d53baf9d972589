"""Compile many configurations at once, in processes of their own; Triton's cache on disk brings the results here."""

import os
import time
from collections.abc import Callable, Iterable
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from typing import NamedTuple

import torch

from matgptq_vllm.kernels.config import Config
from matgptq_vllm.kernels.gemm import sliced_gemm
from matgptq_vllm.kernels.layout import PLANE_WIDTHS, UNIT_K
from matgptq_vllm.kernels.resident import resident_zeros
from matgptq_vllm.kernels.tuning import Problem

ALIGNMENT = 16
"""Triton compiles apart for sizes that are multiples of this."""

PROGRESS_SECONDS = 10.0


class KernelKey(NamedTuple):
    """What two products have in common if the same compiled kernel serves both."""

    widths: tuple[int, ...]
    group_size: int
    rule: str
    config: Config
    n_aligned: bool
    k_aligned: bool
    even_k: bool

    @classmethod
    def of(cls, problem: Problem, config: Config) -> "KernelKey":
        n, k = problem.n, problem.k
        sizes = (n % ALIGNMENT == 0, k % ALIGNMENT == 0, k % UNIT_K == 0)
        return cls(problem.widths, problem.group_size, problem.rule, config, *sizes)


class Compiler:
    """Remembers what is compiled already."""

    def __init__(self, workers: int, device: torch.device, say: Callable[[str], None]) -> None:
        self._workers = workers or os.cpu_count() or 1
        self._device = device
        self._say = say
        self._ready: dict[KernelKey, bool] = {}

    def compile(self, wanted: Iterable[tuple[Problem, Config]], until: float) -> set[tuple[Problem, Config]]:
        """Those of ``wanted`` that are compiled, and ran once, by the time ``until`` (of time.monotonic)."""
        pairs = list(wanted)
        missing = {key: pair for pair in pairs if (key := KernelKey.of(*pair)) not in self._ready}
        if missing:
            self._run(missing, until)
        return {pair for pair in pairs if self._ready.get(KernelKey.of(*pair), False)}

    def _run(self, missing: dict[KernelKey, tuple[Problem, Config]], until: float) -> None:
        # Forked processes could not use the GPU.
        pool = ProcessPoolExecutor(min(self._workers, len(missing)), mp_context=get_context("spawn"))
        try:
            pending: dict[Future[bool], KernelKey] = {
                pool.submit(run_once, *pair, self._device): key for key, pair in missing.items()
            }
            total = len(pending)
            while pending and (left := until - time.monotonic()) > 0:
                done, _ = wait(pending, timeout=min(left, PROGRESS_SECONDS), return_when=FIRST_COMPLETED)
                for future in done:
                    self._ready[pending.pop(future)] = future.result()
                self._say(f"compiled {total - len(pending)} of {total} kernels")
        except BrokenProcessPool:
            self._say("a process that compiled was ended from outside; what it had not compiled is left out")
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def run_once(problem: Problem, config: Config, device: torch.device) -> bool:
    """Compile a configuration by running it on zeros; whether it ran."""
    if device.type == "cuda":
        torch.cuda.set_device(device)
    n, k = problem.n, problem.k
    layer = resident_zeros(n, k, len(PLANE_WIDTHS), torch.bfloat16, problem.group_size, device)
    x = torch.zeros(problem.bucket, k, dtype=torch.bfloat16, device=device)
    rows = torch.zeros(problem.bucket, dtype=torch.int32, device=device)
    widths = torch.tensor(problem.widths, dtype=torch.int32, device=device)
    try:
        y = sliced_gemm(
            x, layer.planes, layer.scales, n, rows, widths, problem.widths, problem.group_size, problem.rule, config,
            layer.locks,
        )  # fmt: skip
        return bool((y == 0).all())
    except Exception:
        # Whatever Triton or its assembler has against a configuration, it is one candidate less.
        return False
