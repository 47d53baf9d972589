"""Microseconds of one layer's products on the GPU, by configuration."""

import time
from collections.abc import Callable, Sequence
from functools import partial

import torch

from matgptq_vllm.kernels.bench.competitors import bytes_of_codes_and_scales, relative_error
from matgptq_vllm.kernels.bench.shapes import GemmShape
from matgptq_vllm.kernels.bench.timing import capture, num_calls, num_copies, take_turns, time_round
from matgptq_vllm.kernels.config import Config
from matgptq_vllm.kernels.dense import dense_linear
from matgptq_vllm.kernels.dispatch import wide_linear
from matgptq_vllm.kernels.gemm import num_locks, sliced_gemm
from matgptq_vllm.kernels.layout import plane_shapes, scales_shape
from matgptq_vllm.kernels.tuning import Problem
from matgptq_vllm.kernels.wide_config import wide_runs

Call = Callable[[torch.Tensor], torch.Tensor]

MAX_ERROR = 2e-2
"""Relative difference between two configurations' outputs above which one of them is wrong."""

ROUNDS = 9

UNIFORM_WIDTH = 4
TYPICAL_ROWS = ((UNIFORM_WIDTH,), (4, 8))
"""What a replica of several widths is timed with: all rows at one width, and rows that take turns at two."""


class RandomLayer:
    """Copies of a random layer in the kernel layout: as many as defeat the L2 cache."""

    def __init__(self, n: int, k: int, group_size: int, narrowest: int, largest_m: int, device: torch.device) -> None:
        """``narrowest`` is the least width, and ``largest_m`` the most rows, that will be timed."""
        self._n, self._k, self._group_size = n, k, group_size
        self._copies = [
            (
                [torch.randint(-(1 << 31), 1 << 31, shape, dtype=torch.int32, device=device) for shape in plane_shapes(n, k)],
                (torch.rand(scales_shape(n, k, group_size), device=device) * 1e-3 + 1e-3).bfloat16(),
            )
            for _ in range(num_copies(self._bytes_read(narrowest)))
        ]
        self._x = torch.randn(largest_m, k, device=device).bfloat16()
        self._locks = torch.zeros(num_locks(n), dtype=torch.int32, device=device)

    def fused(self, problem: Problem, configs: Sequence[Config], seconds: float) -> dict[Config, float]:
        """Microseconds per product by configuration. One whose output differs from the first's is left out."""
        x = self._x[: problem.bucket]
        turns = TYPICAL_ROWS if len(problem.widths) > 1 else (problem.widths,)
        bytes_read = self._bytes_read(turns[0][0])
        rows = [self._rows(problem, widths) for widths in turns]
        calls: dict[str, list[Call]] = {}
        expected: torch.Tensor | None = None
        for index, config in enumerate(configs):
            candidate = [call for given in rows for call in self._calls(bytes_read, self._fused, given, config, problem)]
            found = candidate[-1](x).float()
            expected = found if expected is None else expected
            if relative_error(found, expected) < MAX_ERROR:
                calls[str(index)] = candidate
        return {configs[int(index)]: us for index, us in self._time(calls, x, bytes_read, seconds).items()}

    def crossing(self, problem: Problem, config: Config, m: int, seconds: float) -> tuple[float, float]:
        """Microseconds of what runs below ``dense_from`` and of the dense path, with ``m`` rows of one width."""
        width = problem.widths[0] if len(problem.widths) == 1 else UNIFORM_WIDTH
        bytes_read = self._bytes_read(width)
        rows = self._rows(problem, (width,))
        if wide_runs(self._x.device):
            fused = self._calls(bytes_read, self._wide, rows, problem)
        else:
            fused = self._calls(bytes_read, self._fused, rows, config, problem)
        dense = self._calls(bytes_read, self._dense, width, problem)
        times = self._time({"fused": fused, "dense": dense}, self._x[:m], bytes_read, seconds)
        return times["fused"], times["dense"]

    def _calls(self, bytes_read: int, product: Callable[..., torch.Tensor], *given: object) -> list[Call]:
        """One call of ``product(planes, scales, *given, x)`` per copy that a product which reads so many bytes needs."""
        return [partial(product, planes, scales, *given) for planes, scales in self._copies[: num_copies(bytes_read)]]

    def _fused(
        self,
        planes: list[torch.Tensor],
        scales: torch.Tensor,
        rows: tuple[torch.Tensor, torch.Tensor],
        config: Config,
        problem: Problem,
        x: torch.Tensor,
    ) -> torch.Tensor:
        return sliced_gemm(
            x, planes, scales, self._n, *rows, problem.widths, self._group_size, problem.rule, config, self._locks
        )

    def _wide(
        self,
        planes: list[torch.Tensor],
        scales: torch.Tensor,
        rows: tuple[torch.Tensor, torch.Tensor],
        problem: Problem,
        x: torch.Tensor,
    ) -> torch.Tensor:
        return wide_linear(x, planes, scales, self._n, *rows, problem.widths, self._group_size, problem.rule, self._locks)

    def _dense(
        self, planes: list[torch.Tensor], scales: torch.Tensor, width: int, problem: Problem, x: torch.Tensor
    ) -> torch.Tensor:
        return dense_linear(x, planes, scales, self._n, self._k, [(width, None)], self._group_size, problem.rule)

    def _rows(self, problem: Problem, turns: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """int32 profile of every row, such that rows take turns at the widths, and int32 widths of the profiles."""
        profiles = [problem.widths.index(turns[row % len(turns)]) for row in range(len(self._x))]
        device = self._x.device
        return (
            torch.tensor(profiles, dtype=torch.int32, device=device),
            torch.tensor(problem.widths, dtype=torch.int32, device=device),
        )

    def _time(self, calls: dict[str, list[Call]], x: torch.Tensor, bytes_read: int, seconds: float) -> dict[str, float]:
        """Median microseconds per call of every competitor."""
        if not calls:
            return {}
        flops = 2.0 * x.shape[0] * self._n * self._k
        stream = torch.cuda.Stream(x.device)
        replays = {
            key: capture(several, x, num_calls(len(several), bytes_read, flops), stream) for key, several in calls.items()
        }
        timings = take_turns(lambda: time_round(replays), ROUNDS, seconds, time.monotonic)
        return {key: timing.median_us for key, timing in timings.items()}

    def _bytes_read(self, width: int) -> int:
        return bytes_of_codes_and_scales(GemmShape("", self._n, self._k), width, self._group_size)
