"""Watching a server during a long run: does its memory grow, does it give its KV cache back, do its tokens slow down?"""

import contextlib
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import httpx
import numpy as np
import psutil

from loadtests.campaign import Run
from loadtests.options import Soak
from loadtests.records import CANCELLED, COMPLETED, REFUSED, Record
from loadtests.server import Server
from matgptq_vllm.core.errors import InputError

MEMORY = "process_resident_memory_bytes"
KV_CACHE = "vllm:kv_cache_usage_perc"
RUNNING = "vllm:num_requests_running"
WAITING = "vllm:num_requests_waiting"

INTERVAL_S = 2.0
IDLE_TIMEOUT_S = 60.0
"""A server has this long to end what the run left behind."""


@dataclass(frozen=True)
class Sample:
    """The server at one moment."""

    time_s: float
    """Monotonic clock; of the samples of a run, since it began."""
    memory_bytes: float
    kv_cache: float
    """Share in use."""
    running: float
    waiting: float

    def holds(self) -> bool:
        """Whether any request or KV cache is left."""
        return bool(self.running or self.waiting or self.kv_cache)


@dataclass(frozen=True)
class Check:
    """One thing that a soak test must keep."""

    name: str
    passed: bool
    found: str
    allowed: str


@dataclass
class Watch:
    """A thread that samples a server while the block runs.

    Raises on entry:
        InputError: the server does not say what it holds, or the process is not there.
    """

    server: Server
    soak: Soak
    samples: list[Sample] = field(default_factory=list)
    unanswered: int = 0
    """Samples that the server did not answer."""

    def __enter__(self) -> "Watch":
        self._over = threading.Event()
        self.samples.append(self._sample())
        self._thread = threading.Thread(target=self._loop, name="soak watch", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def during(self, run: Run) -> list[Sample]:
        """Samples from the beginning of a run on; what came before it, such as measuring the capacity, does not count."""
        return [replace(sample, time_s=sample.time_s - run.clock_s) for sample in self.samples if sample.time_s >= run.clock_s]

    def wait_until_idle(self) -> Sample | None:
        """The first sample without requests and KV cache in use, or the last before the time is up; None: no answer."""
        deadline = time.monotonic() + IDLE_TIMEOUT_S
        sample = None
        while time.monotonic() < deadline:
            with contextlib.suppress(httpx.HTTPError):
                sample = self._sample()
                if not sample.holds():
                    break
            time.sleep(INTERVAL_S / 4)
        return sample

    def _loop(self) -> None:
        while not self._over.wait(INTERVAL_S):
            try:
                self.samples.append(self._sample())
            except (httpx.HTTPError, psutil.Error):
                self.unanswered += 1

    def _sample(self) -> Sample:
        found = self.server.metrics()
        missing = [name for name in (KV_CACHE, RUNNING, WAITING) if name not in found]
        if missing:
            raise InputError(
                f"{self.server.url}/metrics has no {', '.join(missing)}; --soak needs a vLLM server with its statistics"
            )
        if self.soak.server_pid is None and MEMORY not in found:
            raise InputError(
                f"{self.server.url}/metrics has no {MEMORY}, as with several API processes; "
                "give the server's process id in --server-pid, on the same machine"
            )
        memory = found[MEMORY] if self.soak.server_pid is None else memory_of(self.soak.server_pid)
        return Sample(time.monotonic(), memory, found[KV_CACHE], found[RUNNING], found[WAITING])


def memory_of(pid: int) -> float:
    """Resident bytes of a process and its children; InputError if there is no such process."""
    try:
        process = psutil.Process(pid)
        return float(sum(one.memory_info().rss for one in [process, *process.children(recursive=True)]))
    except psutil.NoSuchProcess:
        raise InputError(f"--server-pid {pid}: there is no such process on this machine") from None


def checks(
    soak: Soak, samples: Sequence[Sample], idle: Sample | None, records: Sequence[Record], unanswered: int
) -> list[Check]:
    """The verdict on a soak test; ``idle`` is the server after it."""
    growth, drift = memory_growth(samples), itl_drift(records)
    failed = sum(record.outcome not in (COMPLETED, CANCELLED, REFUSED) for record in records)
    left = "no answer"
    if idle is not None:
        left = f"{idle.running:g} running, {idle.waiting:g} waiting, {idle.kv_cache:.2%} of the KV cache"
    return [
        Check(
            "memory growth, first tenth of the time to last",
            growth <= soak.max_memory_growth,
            f"{growth:+.2%}",
            f"{soak.max_memory_growth:.1%}",
        ),
        Check(
            "growth of the p99 inter-token latency, first third to last",
            drift <= soak.max_itl_drift,
            f"{drift:+.1%}",
            f"{soak.max_itl_drift:.1%}",
        ),
        Check("held by the server once idle", idle is not None and not idle.holds(), left, "nothing"),
        Check("failed requests", not failed, f"{failed} of {len(records)}", "0"),
        Check("unanswered questions for metrics", not unanswered, f"{unanswered} of {unanswered + len(samples)}", "0"),
    ]


def memory_growth(samples: Sequence[Sample]) -> float:
    """Median memory of the last tenth of the samples over that of the first tenth, less 1; inf without samples."""
    if not samples:
        return float("inf")
    tenth = max(1, len(samples) // 10)
    memory = np.asarray([sample.memory_bytes for sample in samples])
    return float(np.median(memory[-tenth:]) / np.median(memory[:tenth]) - 1)


def itl_drift(records: Sequence[Record]) -> float:
    """99th percentile of the gaps of requests sent in the last third over that of the first, less 1; inf without gaps."""
    sent = sorted((record for record in records if record.outcome == COMPLETED), key=lambda record: record.start_s)
    if not sent:
        return float("inf")
    end = max(record.end_s for record in sent)
    first = [gap for record in sent if record.start_s < end / 3 for gap in record.gaps_s]
    last = [gap for record in sent if record.start_s >= 2 * end / 3 for gap in record.gaps_s]
    if not first or not last:
        return float("inf")
    return float(np.percentile(last, 99) / np.percentile(first, 99) - 1)
