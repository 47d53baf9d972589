"""Start and stop a real server, as its operator would: by the command ``matgptq serve``."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import httpx
import torch

ROOT = Path(__file__).resolve().parents[2]
START_TIMEOUT_S = 180
MODEL_NAME = "gutenberg"


def python_path(*folders: Path) -> str:
    """The project, ``folders``, and what this process was given: vLLM itself may be there."""
    return os.pathsep.join([str(ROOT), *map(str, folders), *filter(None, [os.environ.get("PYTHONPATH")])])


def engine_environment(runner: str) -> dict[str, str]:
    """Environment in which vLLM runs on this machine with its model runner ``runner``, "v1" or "v2"."""
    environment = {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_USE_V2_MODEL_RUNNER": "1" if runner == "v2" else "0",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": python_path(),
    }
    if runner == "v2" and not torch.cuda.is_available():
        # Runner V2 needs a Triton; its kernels run in Triton's interpreter, by the backend installed beside the others.
        environment |= {"TRITON_INTERPRET": "1", "PYTHONPATH": python_path(Path(sys.prefix) / "triton-interpreter")}
    return environment


class ReplicaServer:
    """A running server; a context manager that stops it by its own pid.

    Args:
        parent: folder of the parent.
        log: file for what the server prints.
        arguments: more arguments of ``matgptq serve``.
        runner: vLLM's model runner, "v1" or "v2".
        environment: more variables of the server's environment.
    """

    def __init__(
        self,
        parent: Path,
        log: Path,
        arguments: Sequence[str] = (),
        runner: str = "v1",
        environment: Mapping[str, str] | None = None,
    ):
        self.runner = runner
        self._log = log
        self._command = [
            *(sys.executable, "-m", "matgptq_vllm.cli", "serve", str(parent), "--host", "127.0.0.1"),
            *("--served-model-name", MODEL_NAME, "--dtype", "float32", "--max-model-len", "1024", "--block-size", "32"),
            *("--enforce-eager", "--distributed-executor-backend", "uni", "--enable-prompt-tokens-details"),
            *("--gpu-memory-utilization", "0.1"),  # several servers run at a time
            *(("--kv-cache-memory-bytes", str(1 << 28)) if torch.cuda.is_available() else ()),
            *(() if "--sweep-seconds" in arguments else ("--sweep-seconds", "0")),
            *arguments,
        ]
        self._environment = {**engine_environment(runner), **(environment or {})}
        self.url = ""
        self.process: subprocess.Popen[bytes]

    def __enter__(self) -> "ReplicaServer":
        port = free_port()
        self.url = f"http://127.0.0.1:{port}"
        with self._log.open("wb") as log:
            self.process = subprocess.Popen(
                [*self._command, "--port", str(port)],
                stdout=log,
                stderr=subprocess.STDOUT,
                env=self._environment,
                cwd=ROOT,
            )
        deadline = time.monotonic() + START_TIMEOUT_S
        while not self._healthy():
            if self.process.poll() is not None or time.monotonic() > deadline:
                self.__exit__()
                raise RuntimeError(f"the server did not start; the end of {self._log}:\n{self.log_text()[-4000:]}")
            time.sleep(0.3)
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGINT)
            try:
                self.process.wait(30)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()

    def log_text(self) -> str:
        """What the server has printed so far."""
        return self._log.read_text(encoding="utf-8", errors="replace")

    def client(self, headers: Mapping[str, str] | None = None) -> httpx.Client:
        """An HTTP client of this server."""
        return httpx.Client(base_url=self.url, headers=headers, timeout=120)

    def _healthy(self) -> bool:
        try:
            return httpx.get(f"{self.url}/health", timeout=2).status_code == 200
        except httpx.TransportError:
            return False


def free_port() -> int:
    """A TCP port of this machine that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
