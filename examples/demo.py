"""What ``make demo`` runs: calibrate the example model once, serve it, ask it at five widths at the same time.

What it makes lies in .demo/ and is used again: the parent, and its perplexities.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import httpx
from openai import OpenAI

ROOT = Path(__file__).resolve().parent.parent
EXAMPLES = ROOT / "examples"
WORK = ROOT / ".demo"
PARENT = WORK / "gutenberg-7m"
PERPLEXITY = WORK / "perplexity.json"
SERVER_LOG = WORK / "server.log"

MATGPTQ = [sys.executable, "-m", "matgptq_vllm.cli"]
MODEL_NAME = "gutenberg-7m"
WIDTHS = ("8", "6", "4", "3", "2")
PROMPTS = ("The old man looked at the sea and", "It was a dark night, and the wind")
MAX_TOKENS = 48
START_TIMEOUT_S = 300

ENVIRONMENT = {
    **os.environ,
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
    # The three below concern CPU hosts only: room for the KV cache in GiB, and one process for engine and worker.
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"),
}


ALL_CORES = {**ENVIRONMENT, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(os.cpu_count()))}
"""For commands that run alone; the server shares the machine with its clients."""


@dataclass(frozen=True)
class Completion:
    """One answer, as its client saw it."""

    text: str
    tokens_per_second: float


def main() -> None:
    """Run the demo."""
    WORK.mkdir(exist_ok=True)
    calibrate()
    perplexities = evaluate()
    port = free_port()
    print(f"Starting the OpenAI-compatible server on port {port} (log: {SERVER_LOG.relative_to(ROOT)}) ...", flush=True)
    server = start_server(port)
    try:
        wait_until_ready(server, port)
        bytes_per_weight = {
            profile["id"]: profile["bytes_per_weight"]
            for profile in httpx.get(f"http://127.0.0.1:{port}/v1/precisions").json()["data"]
        }
        client = OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none")
        complete(client, PROMPTS[0], "8", 1)  # the first request of a server is slower than any other
        requests = [(prompt, width) for prompt in PROMPTS for width in WIDTHS]
        print(f"Asking {len(requests)} times at once: {len(PROMPTS)} prompts at widths {', '.join(WIDTHS)} ...", flush=True)
        with ThreadPoolExecutor(len(requests)) as pool:
            answers = list(pool.map(lambda request: complete(client, *request), requests))
    finally:
        stop(server)
    print_tables(dict(zip(requests, answers, strict=True)), perplexities, bytes_per_weight)


def calibrate() -> None:
    """Calibrate the example model, unless that was done before."""
    if PARENT.exists():
        # One of an earlier format is made anew.
        if subprocess.run([*MATGPTQ, "inspect", PARENT], stdout=subprocess.DEVNULL, check=False).returncode == 0:
            print(f"Using the parent in {PARENT.relative_to(ROOT)} (make clean removes it)", flush=True)
            return
        print(f"Calibrating again, over {PARENT.relative_to(ROOT)} ...", flush=True)
    text = EXAMPLES / "text" / "calibration.txt"
    # Half of the default text: a little less quality in half of the time.
    run([*MATGPTQ, "calibrate", EXAMPLES / "model", "--text", text, "--out", PARENT, "--num-samples", "128", "--overwrite"])


def evaluate() -> dict[str, float]:
    """Perplexity on the example's evaluation text: of the original under "bf16", and of the parent at every width."""
    text = EXAMPLES / "text" / "evaluation.txt"
    # Measured again when the parent or the text is another.
    made_of = f"{(PARENT / 'matgptq_manifest.json').stat().st_mtime_ns} {text.stat().st_mtime_ns}"
    if PERPLEXITY.exists():
        known = json.loads(PERPLEXITY.read_text())
        if known["made_of"] == made_of:
            return known["perplexities"]
    print("Measuring perplexity on the evaluation text ...", flush=True)
    arguments = ["--text", text, "--original", EXAMPLES / "model", "--profile", ",".join(WIDTHS), "--json"]
    report = json.loads(run([*MATGPTQ, "evaluate", PARENT, *arguments], capture=True))
    perplexities = {result["precision"]: result["perplexity"] for result in report["results"]}
    perplexities["bf16"] = report["original"]["perplexity"]
    PERPLEXITY.write_text(json.dumps({"made_of": made_of, "perplexities": perplexities}))
    return perplexities


def run(command: list, capture: bool = False) -> str:
    """Run a command that must succeed; its progress is shown, its output returned if captured."""
    result = subprocess.run(
        [str(part) for part in command], env=ALL_CORES, stdout=subprocess.PIPE if capture else None, text=True
    )
    if result.returncode:
        sys.exit(f"demo: `{' '.join(map(str, command))}` failed with status {result.returncode}")
    return result.stdout or ""


def free_port() -> int:
    """A TCP port that nobody uses."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def start_server(port: int) -> subprocess.Popen:
    """``matgptq serve`` in the background."""
    arguments = [
        *("--host", "127.0.0.1", "--port", str(port), "--served-model-name", MODEL_NAME),
        *("--max-model-len", "1024", "--enforce-eager", "--distributed-executor-backend", "uni"),
    ]
    with SERVER_LOG.open("wb") as log:
        return subprocess.Popen(
            [*MATGPTQ, "serve", str(PARENT), *arguments], env=ENVIRONMENT, stdout=log, stderr=subprocess.STDOUT
        )


def wait_until_ready(server: subprocess.Popen, port: int) -> None:
    """Return when the server answers; end the demo if it does not."""
    deadline = time.monotonic() + START_TIMEOUT_S
    while True:
        try:
            if httpx.get(f"http://127.0.0.1:{port}/health", timeout=2).status_code == 200:
                return
        except httpx.TransportError:
            pass
        if server.poll() is not None or time.monotonic() > deadline:
            stop(server)
            sys.exit(f"demo: the server did not start; the end of {SERVER_LOG}:\n{SERVER_LOG.read_text()[-3000:]}")
        time.sleep(0.3)


def stop(server: subprocess.Popen) -> None:
    """Stop the server and wait for it."""
    if server.poll() is None:
        server.send_signal(signal.SIGINT)
        try:
            server.wait(30)
        except subprocess.TimeoutExpired:
            server.kill()
            server.wait()


def complete(client: OpenAI, prompt: str, width: str, max_tokens: int = MAX_TOKENS) -> Completion:
    """Stream one greedy completion at one width."""
    stream = client.completions.create(
        model=MODEL_NAME,
        prompt=prompt,
        max_tokens=max_tokens,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
        extra_headers={"X-Precision": width},
    )
    begin, text, num_tokens = time.monotonic(), "", 0
    for chunk in stream:
        text += chunk.choices[0].text if chunk.choices else ""
        num_tokens = chunk.usage.completion_tokens if chunk.usage else num_tokens
    return Completion(text, num_tokens / (time.monotonic() - begin))


def print_tables(
    answers: dict[tuple[str, str], Completion], perplexities: dict[str, float], bytes_per_weight: dict[str, float]
) -> None:
    """One row per width, and under it what the width wrote."""
    print(f"\nOne parent, one server; perplexity of the bf16 original: {perplexities['bf16']:.2f}\n")
    print("width  bytes/weight  perplexity  tokens/s  continuation")
    for width in WIDTHS:
        first, *others = [(prompt, answers[prompt, width]) for prompt in PROMPTS]
        speed = sum(answer.tokens_per_second for _, answer in (first, *others)) / len(PROMPTS)
        row = f"{width:>5}  {bytes_per_weight[width]:>12.3f}  {perplexities[width]:>10.2f}  {speed:>8.1f}  "
        print(row + shown(*first))
        for other in others:
            print(" " * len(row) + shown(*other))
    print("\ntokens/s is per request; all of them share every step of the engine, so the widths advance together.")


def shown(prompt: str, answer: Completion, limit: int = 110) -> str:
    """Prompt and continuation on one line."""
    line = " ".join(f"{prompt} ... {answer.text.strip()}".split())
    return line if len(line) <= limit else line[: limit - 3] + "..."


if __name__ == "__main__":
    main()
