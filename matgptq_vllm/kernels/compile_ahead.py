"""Compile the kernels of a model's layers before a batch needs them: all at once, in processes of their own.

Triton compiles a kernel when it is first called, one after the other, some seconds each; a replica of five widths has some
dozens. Each process here calls the products of every so-manieth layer and number of rows once, on weights of zeros; Triton's
cache on disk brings the result to the engine. What was compiled is remembered in a file, call by call, so that later starts,
of other replicas too, skip it.
"""

import hashlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import triton
from filelock import FileLock

from matgptq_vllm.core.slicing import SliceRule
from matgptq_vllm.kernels import dispatch, tuning
from matgptq_vllm.kernels.lanes_ptx import bits_needed
from matgptq_vllm.kernels.layout import num_planes
from matgptq_vllm.kernels.resident import resident_zeros
from matgptq_vllm.kernels.wide_config import wide_runs

ROWS = (1, 4, 8, 16, 32, 64, 128, 256, 511)
"""One number of rows for every configuration that products of fewer rows than ``dense_from`` have."""

MORE_ROWS = (512, 1024)
"""The same for rows of several widths from ``dense_from`` on, up to ``wide_config.WIDE_TO``."""

MAX_PROCESSES = 32

PROCESS_BYTES = 1 << 30
"""Memory of the GPU that a process takes while it compiles: CUDA's own, and a layer."""

TIMEOUT_S = 600.0
DIRECTORY_VARIABLE = "MATGPTQ_KERNEL_CACHE"


@dataclass(frozen=True)
class LayerKind:
    """What layers have in common if the same compiled kernels serve them."""

    n: int
    k: int
    widths: tuple[int, ...]
    """Every width that a row may have, ascending."""
    group_size: int
    rule: SliceRule
    dtype: str
    """Of activations, as torch names it."""
    scale_dtype: str
    most_rows: int | None = None
    """Of any product; None: any number."""


@dataclass(frozen=True)
class Call:
    """One product to call."""

    kind: LayerKind
    rows: int
    width: int
    """Of all rows; the kernels for several widths have a loop for each, so one is enough up to ``dense_from``."""
    captured: bool
    """Whether to call what a CUDA graph would capture, which is also what rows of several widths run."""


def calls(kinds: Iterable[LayerKind], device: torch.device) -> list[Call]:
    """The products whose calls compile all that steps of any size run; the slowest to compile first."""
    result = []
    for kind in sorted(set(kinds), key=lambda kind: (-kind.n * kind.k, kind.n)):
        from_rows = tuning.dense_from(kind.n, kind.k, device)
        most_rows = from_rows - 1 if kind.most_rows is None else min(kind.most_rows, from_rows - 1)
        result += [Call(kind, rows, kind.widths[-1], False) for rows in ROWS if rows <= most_rows]
        if kind.most_rows is not None:
            continue
        result += [Call(kind, from_rows, width, False) for width in kind.widths]
        if len(kind.widths) > 1:
            more = [rows for rows in MORE_ROWS if rows >= from_rows] if wide_runs(device) else [from_rows]
            result += [Call(kind, rows, kind.widths[0], True) for rows in more]
    return result


def call_once(call: Call, device: torch.device) -> None:
    """Call a product on zeros."""
    kind = call.kind
    count = num_planes(bits_needed(kind.widths[-1], kind.rule))
    layer = resident_zeros(kind.n, kind.k, count, getattr(torch, kind.scale_dtype), kind.group_size, device)
    x = torch.zeros(call.rows, kind.k, dtype=getattr(torch, kind.dtype), device=device)
    profile = kind.widths.index(call.width)
    host_widths = torch.tensor(kind.widths, dtype=torch.int32)
    step_profiles = torch.zeros(len(kind.widths), dtype=torch.int32)
    step_profiles[profile] = call.rows
    token_profiles = torch.full((call.rows,), profile, dtype=torch.int32, device=device)
    row_order = torch.arange(call.rows, dtype=torch.int32, device=device)
    dispatch.sliced_linear(
        x, layer.planes, layer.scales, kind.n, token_profiles, host_widths.to(device), row_order, step_profiles, host_widths,
        layer.locks, kind.widths, kind.group_size, kind.rule, None, not call.captured,
    )  # fmt: skip


def compile_ahead(kinds: Iterable[LayerKind], device: torch.device, say: Callable[[str], None]) -> None:
    """Compile all that products of ``kinds`` run on ``device``, unless that was done before, and load it into this process.

    A process that fails costs speed only: what it did not compile, the first batch that needs it does. Never raises for that.

    Args:
        say: gets lines of progress, and what failed.
    """
    wanted = calls(kinds, device)
    if not wanted:
        return
    journal = _directory() / f"{_digest(device)}.json"
    journal.parent.mkdir(parents=True, exist_ok=True)
    # Of the workers of a replica, one compiles for all.
    with FileLock(journal.with_suffix(".lock")):
        done = set(json.loads(journal.read_text(encoding="utf-8"))) if journal.exists() else set()
        missing = [call for call in wanted if _name(call) not in done]
        if missing:
            compiled = _compile(missing, device, say)
            journal.write_text(json.dumps(sorted(done | {_name(call) for call in compiled}), indent=1), encoding="utf-8")
            if len(compiled) < len(missing):
                return
    # Whoever compiles the model next may tell Triton of another cache on disk, as vLLM does. What was called once stays.
    for call in wanted:
        call_once(call, device)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()


def _compile(missing: list[Call], device: torch.device, say: Callable[[str], None]) -> list[Call]:
    """Call products in processes; returns those whose processes did all their part."""
    count = min(len(missing), os.cpu_count() or 1, MAX_PROCESSES)
    if device.type == "cuda":
        count = max(1, min(count, torch.cuda.mem_get_info(device)[0] // PROCESS_BYTES))
    say(f"compiling kernels for {len(missing)} products in {count} processes; later starts find them")
    begin = time.monotonic()
    parts = [missing[part::count] for part in range(count)]
    command = [sys.executable, "-m", "matgptq_vllm.kernels.compile_ahead", str(device)]
    given = [json.dumps([asdict(call) for call in part]) for part in parts]
    processes = [
        subprocess.Popen([*command, part], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) for part in given
    ]
    compiled, failures = [], []
    for process, part in zip(processes, parts, strict=True):
        failure = _end(process, begin + TIMEOUT_S)
        if failure:
            failures.append(failure)
        else:
            compiled += part
    if failures:
        say(f"{len(failures)} of {count} processes that compile kernels failed; the first: {failures[0]}")
    else:
        say(f"kernels compiled in {time.monotonic() - begin:.0f} s")
    return compiled


def _end(process: "subprocess.Popen[str]", until: float) -> str:
    """Wait for a process; why it failed, or nothing."""
    try:
        _, errors = process.communicate(timeout=max(until - time.monotonic(), 1.0))
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
        return f"took longer than {TIMEOUT_S:.0f} s"
    lines = errors.strip().splitlines() or ["no message"]
    return "" if process.returncode == 0 else lines[-1]


def _name(call: Call) -> str:
    return hashlib.sha256(str(call).encode()).hexdigest()[:32]


def _digest(device: torch.device) -> str:
    """Changes with whatever the compiled kernels depend on beside the calls: the GPU, Triton, and all sources here."""
    sources = [path.read_bytes() for path in sorted(Path(__file__).parent.glob("*.py"))]
    about = [triton.__version__, tuning.hardware_of(device).name]
    return hashlib.sha256(b"".join([*sources, *(line.encode() for line in about)])).hexdigest()[:32]


def _directory() -> Path:
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return Path(os.environ.get(DIRECTORY_VARIABLE) or cache / "matgptq" / "kernels")


def main(arguments: list[str]) -> None:
    """Call the products that are given as JSON on the device named first."""
    device = torch.device(arguments[0])
    if device.type == "cuda":
        torch.cuda.set_device(device)
    for given in json.loads(arguments[1]):
        kind = LayerKind(**{**given["kind"], "widths": tuple(given["kind"]["widths"])})
        call_once(Call(kind, given["rows"], given["width"], given["captured"]), device)
    if device.type == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    main(sys.argv[1:])
