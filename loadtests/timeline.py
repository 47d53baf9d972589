"""``python -m loadtests.timeline URL --out DIR -- COMMAND``: load, width and latency of a server while COMMAND loads it.

The server is asked twice a second what runs at which precision, and how long tokens took. Writes timeline.json and
timeline.png (which needs matplotlib).
"""

import argparse
import json
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import httpx

from loadtests.metrics_text import totals

PERIOD_S = 0.5

TOKEN_TIME = "vllm:inter_token_latency_seconds"
"""Histogram of vLLM whose sum and count tell the mean time per token between two moments."""


@dataclass(frozen=True)
class Sample:
    """A server at one moment."""

    time_s: float
    """Since the first sample."""

    running: int
    waiting: int
    width: float | None
    """Mean bits per weight of the running sequences; None if nothing runs."""

    token_ms: float | None
    """Mean time between tokens since the sample before; None if there were none."""


class Watch:
    """Samples one server.

    Args:
        client: of the server, with whatever key it needs.
    """

    def __init__(self, client: httpx.Client) -> None:
        self._client = client
        self._began = time.monotonic()
        self._token_time = token_time(self._metrics())
        self.samples: list[Sample] = []

    def sample(self) -> None:
        """Ask the server once."""
        document = self._client.get("/v1/precisions").raise_for_status().json()
        before, self._token_time = self._token_time, token_time(self._metrics())
        self.samples.append(sample(document, before, self._token_time, time.monotonic() - self._began))

    def run(self, ended: threading.Event) -> None:
        """Sample until ``ended``. A moment at which the server does not answer is left out."""
        while not ended.wait(PERIOD_S):
            try:
                self.sample()
            except httpx.HTTPError as error:
                print(f"timeline: a sample is missing ({type(error).__name__})", file=sys.stderr)

    def latency_model(self) -> dict[str, Any]:
        """What the server knows of its steps now."""
        return self._client.get("/v1/precisions").raise_for_status().json()["latency_model"]

    def _metrics(self) -> str:
        return self._client.get("/metrics").text


def token_time(metrics: str) -> tuple[float, float]:
    """(seconds, tokens) so far, from the text of ``/metrics``."""
    found = totals(metrics, TOKEN_TIME)
    return found.get(f"{TOKEN_TIME}_sum", 0.0), found.get(f"{TOKEN_TIME}_count", 0.0)


def sample(document: Mapping[str, Any], before: tuple[float, float], now: tuple[float, float], time_s: float) -> Sample:
    """What ``GET /v1/precisions`` and two readings of ``token_time`` come to."""
    bits = {entry["id"]: entry["average_bits"] for entry in document["data"]}
    running = document["load"]["running"]
    total = sum(running.values())
    seconds, tokens = now[0] - before[0], now[1] - before[1]
    return Sample(
        time_s=round(time_s, 3),
        running=total,
        waiting=document["load"]["waiting"],
        width=sum(bits[name] * count for name, count in running.items()) / total if total else None,
        token_ms=1e3 * seconds / tokens if tokens > 0 else None,
    )


def draw(samples: Sequence[Sample], budget_ms: float | None, path: Path) -> None:
    """Load, width and time per token over time."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (load, width, latency) = pyplot.subplots(3, 1, figsize=(9, 6.5), sharex=True, constrained_layout=True)
    times = [found.time_s for found in samples]
    load.fill_between(times, [found.running + found.waiting for found in samples], step="post", color="0.8", label="waiting")
    load.fill_between(times, [found.running for found in samples], step="post", color="0.5", label="running")
    load.set_ylabel("sequences")
    load.legend(loc="upper left", fontsize="small")
    missing = float("nan")
    width.step(times, [missing if found.width is None else found.width for found in samples], where="post")
    width.set_ylabel("mean bits per weight")
    latency.plot(times, [missing if found.token_ms is None else found.token_ms for found in samples], ".-", markersize=3)
    if budget_ms is not None:
        latency.axhline(budget_ms, color="black", linewidth=0.8)
    latency.set_ylabel("ms per token")
    latency.set_xlabel("seconds")
    figure.savefig(path, dpi=80)
    pyplot.close(figure)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command, watch the server meanwhile; returns the command's status."""
    parser = argparse.ArgumentParser(
        prog="python -m loadtests.timeline", description="Draw what a server does while a command loads it."
    )
    parser.add_argument("url", help="the server, such as http://localhost:8000")
    parser.add_argument("--out", type=Path, required=True, help="folder of timeline.json and timeline.png")
    parser.add_argument("--budget-ms", type=float, help="time per token to mark in the picture")
    parser.add_argument("--key", help="API key of the server, if it wants one")
    parser.add_argument("command", nargs="+", help="the command, after --")
    given = parser.parse_args(arguments)
    given.out.mkdir(parents=True, exist_ok=True)
    headers = {} if given.key is None else {"Authorization": f"Bearer {given.key}"}
    ended = threading.Event()
    with httpx.Client(base_url=given.url, headers=headers, timeout=30) as client:
        watch = Watch(client)
        watcher = threading.Thread(target=watch.run, args=(ended,))
        watcher.start()
        try:
            status = subprocess.run(given.command, check=False).returncode
        finally:
            ended.set()
            watcher.join()
        document = {
            "budget_ms": given.budget_ms,
            "latency_model": watch.latency_model(),
            "samples": [asdict(found) for found in watch.samples],
        }
    (given.out / "timeline.json").write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    draw(watch.samples, given.budget_ms, given.out / "timeline.png")
    return status


if __name__ == "__main__":
    sys.exit(main())
