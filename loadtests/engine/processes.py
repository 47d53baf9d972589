"""Engines as processes: started at once, measured one after the other."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from loadtests.engine.measure import Plan, ready_file
from loadtests.engine.variants import PEERS

POLL_S = 0.2


class EngineProcess:
    """One engine's process, which leaves its result in ``out``."""

    def __init__(self, plan: Plan, out: Path):
        self.variant = plan.variant
        self._log, self._result, source = (out / f"{plan.variant}.{ending}" for ending in ("log", "json", "plan.json"))
        source.write_text(json.dumps(asdict(plan)), encoding="utf-8")
        for stale in (self._result, ready_file(self._result)):
            stale.unlink(missing_ok=True)
        print(f"{plan.variant}: starting, log in {self._log}", file=sys.stderr, flush=True)
        command = [sys.executable, "-m", "loadtests.engine.measure", str(source), str(self._result), "--wait"]
        with self._log.open("wb") as output:
            # A session of its own: vLLM starts processes that must end with it.
            self._process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=output, stderr=subprocess.STDOUT, env=_environment(plan),
                start_new_session=True,
            )  # fmt: skip

    @property
    def starting(self) -> bool:
        """Whether it will yet be ready."""
        return self._process.poll() is None and not ready_file(self._result).exists()

    def measured(self, timeout_s: float) -> bool:
        """Tell it to measure, and wait for its end; False, with the end of its log, if it has failed."""
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(b"begin\n")
            self._process.stdin.close()
        try:
            self._process.wait(max(timeout_s, POLL_S))
        except subprocess.TimeoutExpired:
            print(f"{self.variant}: not done in time", file=sys.stderr)
        self.end()
        if self._result.exists():
            return True
        print(f"{self.variant} failed:\n{self._log.read_text(errors='replace')[-3000:]}", file=sys.stderr)
        return False

    def end(self) -> None:
        """Kill what is left of it."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        ready_file(self._result).unlink(missing_ok=True)


def measure(plans: Sequence[Plan], out: Path, timeout_s: float) -> int:
    """Start an engine for each plan, and when all have started, measure one after the other; returns how many failed.

    Args:
        timeout_s: for all of them.
    """
    deadline = time.monotonic() + timeout_s
    engines = [EngineProcess(plan, out) for plan in plans]
    try:
        while any(engine.starting for engine in engines) and time.monotonic() < deadline:
            time.sleep(POLL_S)
        return sum(not engine.measured(deadline - time.monotonic()) for engine in engines)
    finally:
        for engine in engines:
            engine.end()


def _environment(plan: Plan) -> dict[str, str]:
    environment = {"VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1", "VLLM_USE_FLASHINFER_SAMPLER": "0", **os.environ}
    if plan.variant in PEERS and PEERS[plan.variant].disabled:
        environment["VLLM_DISABLED_KERNELS"] = ",".join(PEERS[plan.variant].disabled)
    return environment
