"""The run of ``matgptq tune``: this process's GPU, the table it is written to, and what is said of it."""

import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from math import exp, log

import torch

from matgptq_vllm.core.errors import UnsupportedError
from matgptq_vllm.kernels import tables
from matgptq_vllm.kernels.config import Config
from matgptq_vllm.kernels.tables import Table
from matgptq_vllm.kernels.tune.compiling import Compiler
from matgptq_vllm.kernels.tune.layer import RandomLayer
from matgptq_vllm.kernels.tune.options import TuneOptions
from matgptq_vllm.kernels.tune.search import Gain, Machine, search
from matgptq_vllm.kernels.tuning import Hardware, Problem, hardware_of, table_of
from matgptq_vllm.kernels.wide_config import wide_runs


class Gpu:
    """The current GPU as ``search.Machine``."""

    def __init__(self, workers: int) -> None:
        """UnsupportedError if there is none that the kernels run on."""
        if not torch.cuda.is_available():
            raise UnsupportedError(
                "no CUDA GPU is visible to torch; `matgptq tune` times GPU kernels: run it where they will run"
            )
        self._device = torch.device("cuda", torch.cuda.current_device())
        self.hardware: Hardware = hardware_of(self._device)
        self.by_rule = wide_runs(self._device)
        self._compiler = Compiler(workers, self._device, _say)

    def compile(self, wanted: Iterable[tuple[Problem, Config]], until: float) -> set[tuple[Problem, Config]]:
        return self._compiler.compile(wanted, until)

    def layer(self, n: int, k: int, group_size: int, narrowest: int, largest_m: int) -> RandomLayer:
        torch.cuda.empty_cache()
        return RandomLayer(n, k, group_size, narrowest, largest_m, self._device)


def run_tuning(options: TuneOptions) -> str:
    """Measure, write the table after every shape, and return a summary.

    Raises:
        UnsupportedError: there is no GPU for the kernels. FormatError: a table to start from is damaged.
    """
    return tune(options, Gpu(options.workers))


def tune(options: TuneOptions, machine: Machine) -> str:
    """``run_tuning`` on a given machine."""
    gpu = machine.hardware.name
    path = options.out or tables.user_directory() / tables.file_name(gpu)
    table = tables.read(path) if path.is_file() else Table()
    started = time.monotonic()
    gains: list[Gain] = []
    dense_from: dict[tuple[int, int], int] = {}
    missing = 0
    for found in search(options, table_of(gpu).updated(table), machine, _say):
        gains += found.gains
        missing += found.missing
        if found.gains or found.table.dense_from:
            dense_from |= found.table.dense_from
            table = table.updated(found.table)
            tables.write(path, table, gpu)
    lines = [summary(gpu, gains, dense_from, missing, time.monotonic() - started)]
    if machine.by_rule:
        lines.append("products of fewer rows follow rules on this GPU, not tables")
    if gains or dense_from:
        lines.append(f"wrote {path}; replicas started from now on use it")
    return "\n".join(lines)


def summary(gpu: str, gains: Sequence[Gain], dense_from: Mapping[tuple[int, int], int], missing: int, seconds: float) -> str:
    """What was found, a line per shape and class of widths, and one per shape."""
    lines = [f"{gpu}: {len(gains)} entries in {seconds:.0f} s"]
    rows: dict[tuple[int, int, str], list[Gain]] = {}
    for gain in gains:
        rows.setdefault((gain.problem.n, gain.problem.k, gain.problem.key.widths), []).append(gain)
    for (n, k, widths), found in rows.items():
        times = ", ".join(f"M {gain.problem.bucket}: {gain.us:.1f}" for gain in found)
        lines.append(f"  {n}x{k} widths {widths}: {_speedup(found)}; microseconds {times}")
    lines += [f"  {n}x{k}: from {rows} rows of one width on expanded for cuBLAS" for (n, k), rows in dense_from.items()]
    if missing:
        lines.append(
            f"{missing} entries were not measured in the time allowed; run again with more --seconds, or fewer --shapes"
        )
    if gains:
        lines.append(f"all: {_speedup(gains)}")
    return "\n".join(lines)


def _speedup(gains: Sequence[Gain]) -> str:
    """Geometric mean over those whose time before is known."""
    ratios = [log(gain.before_us / gain.us) for gain in gains if gain.before_us is not None]
    return f"{exp(sum(ratios) / len(ratios)):.2f}x as fast as before" if ratios else "not compared with what was in use"


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
