"""The measurement itself: one model's layers, one after the other, every competitor at every M."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from statistics import median

import torch

from matgptq_vllm.core.errors import UnsupportedError
from matgptq_vllm.kernels.bench import peers
from matgptq_vllm.kernels.bench.competitors import Competitor, Problem, Workload, relative_error
from matgptq_vllm.kernels.bench.options import BenchOptions
from matgptq_vllm.kernels.bench.ours import ParentCopies
from matgptq_vllm.kernels.bench.results import Cell, Failure
from matgptq_vllm.kernels.bench.shapes import MODELS, GemmShape
from matgptq_vllm.kernels.bench.timing import Replay, capture, num_calls, take_turns, time_round

MAX_ERROR = 2e-2
"""Relative error of an output above which its time means nothing: bfloat16 arithmetic stays near 3e-3."""

TIMED_SHARE = 0.6
"""Share of the time left that may go into timed rounds; the rest is for making weights, compiling and capturing."""

COPY_BYTES = 1 << 30
COPY_REPEATS = 9

OUT_OF_TIME = "the time allowed by --seconds was over"


class DeviceLostError(UnsupportedError):
    """The GPU answers no more, so that nothing else can be measured in this process."""


class Measurement:
    """Cells and failures as they come; those that are here when an exception escapes are good."""

    def __init__(self, options: BenchOptions, device: torch.device, clock: Callable[[], float] = time.monotonic) -> None:
        self.cells: list[Cell] = []
        self.failures: list[Failure] = []
        self._options = options
        self._device = device
        self._clock = clock
        self._stream = torch.cuda.Stream(device)

    def model(self, model: str) -> None:
        """Measure all layers of ``model`` within the seconds allowed; a line of progress for each goes to stderr.

        Raises:
            DeviceLostError: a competitor broke the GPU's state.
        """
        deadline = self._clock() + self._options.seconds
        shapes = MODELS[model]
        for index, shape in enumerate(shapes):
            started = self._clock()
            self._layer(model, shape, deadline, len(shapes) - index)
            torch.cuda.empty_cache()
            now = self._clock()
            print(
                f"{self._progress(model, shape)} in {now - started:.1f} s, {deadline - now:.0f} s left",
                file=sys.stderr,
                flush=True,
            )

    def _layer(self, model: str, shape: GemmShape, deadline: float, layers_left: int) -> None:
        options = self._options
        x = torch.randn(max(options.ms), shape.k, device=self._device).bfloat16()
        workloads = self._workloads(model, Problem(shape, x, options.group_size, options.rule))
        for index, m in enumerate(options.ms):
            ready: dict[Competitor, tuple[Replay, float]] = {}
            for competitor, workload in workloads.items():
                if m < competitor.min_rows:
                    continue
                with self._failing(model, shape, competitor, m):
                    if self._clock() > deadline:
                        raise UnsupportedError(OUT_OF_TIME)
                    ready[competitor] = self._ready(workload, x[:m], shape)
            if ready:
                slots_left = layers_left * len(options.ms) - index
                seconds = TIMED_SHARE * (deadline - self._clock()) / slots_left
                self._time(model, shape, m, workloads, ready, seconds)

    def _workloads(self, model: str, problem: Problem) -> dict[Competitor, Workload]:
        """Every competitor's weights, of those that can have any."""
        ours = [competitor for competitor in self._options.competitors if competitor.is_ours]
        copies = None
        workloads = {}
        for competitor in self._options.competitors:
            with self._failing(model, problem.shape, competitor, None):
                if competitor.is_ours:
                    copies = copies or ParentCopies(problem, ours)
                    workloads[competitor] = copies.workload(competitor)
                else:
                    workloads[competitor] = peers.build(competitor, problem)
        return workloads

    def _ready(self, workload: Workload, x: torch.Tensor, shape: GemmShape) -> tuple[Replay, float]:
        """A graph of the competitor on ``x`` (bfloat16 [M, k]), and its error; UnsupportedError if that is too large."""
        m = x.shape[0]
        # The output most likely gets this memory, so that an element which nothing writes shows.
        poison = torch.full((m, shape.n), float("nan"), dtype=x.dtype, device=x.device)
        del poison
        error = relative_error(workload.calls[0](x), workload.reference[:m])
        if not error < MAX_ERROR:
            raise UnsupportedError(f"its output is wrong, by {error:.2g} relative to the product in float32")
        count = num_calls(len(workload.calls), workload.bytes_read, 2.0 * m * shape.num_weights)
        return capture(workload.calls, x, count, self._stream), error

    def _time(
        self,
        model: str,
        shape: GemmShape,
        m: int,
        workloads: dict[Competitor, Workload],
        ready: dict[Competitor, tuple[Replay, float]],
        seconds: float,
    ) -> None:
        replays = {competitor.key: replay for competitor, (replay, _) in ready.items()}
        try:
            timings = take_turns(lambda: time_round(replays), self._options.rounds, seconds, self._clock)
        except RuntimeError as lost:
            raise DeviceLostError(f"{model} {shape.layer}, M = {m}: a replay failed: {lost}") from lost
        for competitor, (_, error) in ready.items():
            timing = timings[competitor.key]
            self.cells.append(
                Cell(
                    model=model,
                    layer=shape.layer,
                    n=shape.n,
                    k=shape.k,
                    competitor=competitor.key,
                    m=m,
                    us=timing.median_us,
                    low_us=timing.low_us,
                    high_us=timing.high_us,
                    rounds=timing.rounds,
                    bytes_read=workloads[competitor].bytes_read,
                    error=error,
                )
            )

    @contextmanager
    def _failing(self, model: str, shape: GemmShape, competitor: Competitor, m: int | None) -> Iterator[None]:
        """A failure inside is recorded and ends there, unless it took the GPU with it."""
        try:
            yield
        except Exception as error:
            reason = str(error).strip().partition("\n")[0] or type(error).__name__
            self.failures.append(Failure(model, shape.layer, competitor.key, m, reason))
            try:
                torch.cuda.synchronize(self._device)
            except RuntimeError as lost:
                raise DeviceLostError(
                    f"the GPU failed in {competitor.key} on {model} {shape.layer} ({reason}); choose others with --only"
                ) from lost

    def _progress(self, model: str, shape: GemmShape) -> str:
        cells = [cell for cell in self.cells if (cell.model, cell.layer) == (model, shape.layer)]
        competitors, ms = {cell.competitor for cell in cells}, {cell.m for cell in cells}
        rounds = min((cell.rounds for cell in cells), default=0)
        return (
            f"{model} {shape.layer} {shape.n}x{shape.k}: {len(competitors)} competitors, {len(ms)} values of M, "
            f"{rounds} rounds or more"
        )


def copy_bytes_per_s(device: torch.device) -> float:
    """Bytes read plus bytes written per second by a device-to-device copy of 1 GiB of random data."""
    source = torch.randint(256, (COPY_BYTES,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    seconds = []
    for _ in range(COPY_REPEATS):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        target.copy_(source)
        end.record()
        torch.cuda.synchronize(device)
        seconds.append(1e-3 * start.elapsed_time(end))
    return 2 * COPY_BYTES / median(seconds)
