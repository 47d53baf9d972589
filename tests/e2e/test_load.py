"""Load tests against a real server: matgptq loadtest, and loadtests.agreement."""

import csv
import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from loadtests.redraw import main as redraw
from matgptq_vllm.cli import main

from .replica_server import MODEL_NAME, ROOT, ReplicaServer, engine_environment

pytestmark = pytest.mark.engine

SHORT = ("--seconds", "4", "--input-len", "20", "--output-len", "5", "--warmups", "1", "--concurrency", "3")


def command(server: ReplicaServer, out: Path, *arguments: str) -> list[str]:
    verb = [sys.executable, "-m", "matgptq_vllm.cli", "loadtest", server.url, "--model", MODEL_NAME, "--out", str(out)]
    return [*verb, *SHORT, *arguments]


def load(server: ReplicaServer, out: Path, *arguments: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        command(server, out, *arguments), capture_output=True, text=True, env=engine_environment("v1"), cwd=ROOT, timeout=300
    )


class Printed(NamedTuple):
    """What a load test in this process, which spares a start of Python, came to."""

    returncode: int
    stdout: str
    stderr: str


@pytest.fixture
def load_here(capfd: pytest.CaptureFixture[str]) -> Callable[..., Printed]:
    """As ``load``, in this process."""

    def run(server: ReplicaServer, out: Path, *arguments: str) -> Printed:
        status = main(command(server, out, *arguments)[3:])
        return Printed(status, *capfd.readouterr())

    return run


def report_in(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "report.json").read_text())


def test_every_precision_is_loaded_reported_and_compared(v1_server: ReplicaServer, tmp_path: Path) -> None:
    def generated() -> dict[str, int]:
        with v1_server.client() as client:
            return client.get("/v1/precisions").json()["workers"][0]["tokens"]

    before = generated()
    # The second server is the first: the same load, so about the same numbers.
    done = load(v1_server, tmp_path, "--precisions", "3,mix-depth,mix,auto", "--rates", "2,inf", "--requests", "6", "--trace",
                "fixed",
                "--budget-ms", "60000", "--slo", "tpot:60000", "--against", v1_server.url)  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    report = report_in(tmp_path)
    assert len(report["runs"]) == 4 * 2 * 2
    for run in report["runs"]:
        summary = run["summary"]
        assert (summary["completed"], summary["failed"], summary["good_share"]) == (8 if run["rate"] == "2" else 6, 0, 1.0)
        assert 0 < summary["itl"]["p50"] <= summary["itl"]["p90"] <= summary["itl"]["p99"] < summary["e2e"]["p99"]
        assert 0 < summary["ttft"]["p50"] < summary["e2e"]["p50"]
        given = {"mix": {"3", "mix-depth"}, "auto": {"8"}}.get(run["precision"], {run["precision"]})
        assert set(run["parts"]) == set(summary["tokens"]) == given
    assert {one["number"] for one in report["comparison"]} >= {"tokens/s", "TTFT p50", "ITL p99", "end to end p50"}
    # All requests of fixed widths, warm-ups included, were computed at them and nothing at others.
    gained = {name: count - before[name] for name, count in generated().items()}
    assert all(gained[name] >= 28 * (20 + 5 - 1) for name in ("3", "mix-depth", "8"))
    assert all(gained[name] == 0 for name in ("2", "4", "6", "mix-kind"))
    with (tmp_path / "report.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 4 * 2 * 2 + 2 * 2 * 2
    assert all(float(row["ttft_p50_ms"]) > 0 for row in rows)
    assert "## Tested server over the other" in (tmp_path / "report.md").read_text()
    pictures = {path: path.read_bytes() for path in (tmp_path / "latency.png", tmp_path / "widths.png")}
    assert all(drawn.startswith(b"\x89PNG") for drawn in pictures.values())
    for path in pictures:
        path.unlink()
    # The files that stay have all that is in the pictures.
    assert redraw([str(tmp_path)]) == 0
    assert {path: path.read_bytes() for path in pictures} == pictures


def test_a_soak_with_cancelled_and_malformed_requests_leaves_nothing_behind(
    v1_server: ReplicaServer, profiled_parent: Path, tmp_path: Path, load_here: Callable[..., Printed]
) -> None:
    done = load_here(v1_server, tmp_path, "--soak", "12s", "--precisions", "mix", "--rates", "4", "--output-len", "2-12",
                "--cancel", "30%", "--malformed", "20%", "--tokenizer", str(profiled_parent),
                "--max-itl-drift", "1000%", "--max-memory-growth", "20%")  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    report = report_in(tmp_path)
    (run,) = report["runs"]
    assert run["summary"]["refused"] > 0 < run["summary"]["cancelled"]
    assert set(run["parts"]) >= {"2", "3", "4", "6", "8"}
    assert [check["passed"] for check in report["soak"]["checks"]] == [True] * 5
    assert report["soak"]["samples"][0]["memory_bytes"] > 2**27
    assert (tmp_path / "soak.png").exists()


def test_interrupted_it_reports_what_there_is_and_a_later_test_is_held_against_it(
    v1_server: ReplicaServer, tmp_path: Path, load_here: Callable[..., Printed]
) -> None:
    first = tmp_path / "first"
    process = subprocess.Popen(
        command(v1_server, first, "--precisions", "3,8", "--rates", "2", "--seconds", "6"),
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=engine_environment("v1"), cwd=ROOT,
    )  # fmt: skip
    deadline = time.monotonic() + 200
    while not (first / "runs" / "001.trace").exists():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.2)
    time.sleep(3)
    process.send_signal(signal.SIGINT)
    printed, _ = process.communicate(timeout=60)
    assert process.returncode == 130, printed
    report = report_in(first)
    assert report["interrupted"] is True
    whole, part = report["runs"]
    assert (whole["precision"], whole["partial"], whole["summary"]["completed"]) == ("3", False, whole["summary"]["requests"])
    assert (part["precision"], part["partial"]) == ("8", True)
    assert (first / "latency.png").exists()
    baseline = str(first / "report.json")
    for allowed, status in (("100000%", 0), ("0%", 1)):
        done = load_here(v1_server, tmp_path / "now", "--precisions", "3", "--rates", "2", "--seconds", "6", "--baseline",
                         baseline, "--fail-if", allowed)  # fmt: skip
        assert done.returncode == status, done.stdout + done.stderr
        if status == 0:
            # Every latency of a baseline that was impossibly fast is worse now.
            fast = json.loads(Path(baseline).read_text())
            for run in fast["runs"]:
                run["summary"]["itl"]["p50"] = 1e-6
            baseline = str(tmp_path / "fast.json")
            Path(baseline).write_text(json.dumps(fast))
    assert "itl.p50 was 1e-06" in done.stdout
    done = load_here(v1_server, tmp_path / "now", "--precisions", "3,five")
    assert (done.returncode, "does not offer precision five; it offers 2, " in done.stderr) == (2, True)
    done = load_here(v1_server, tmp_path / "now", "--tokenizer", str(tmp_path))
    assert (done.returncode, f"no tokenizer in {tmp_path}" in done.stderr) == (2, True)


def test_mixed_batches_answer_as_single_requests_do(v1_server: ReplicaServer, evaluation_text: Path, tmp_path: Path) -> None:
    def agreement(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "loadtests.agreement", *arguments]
        return subprocess.run(command, capture_output=True, text=True, env=engine_environment("v1"), cwd=ROOT, timeout=300)

    for name, concurrency in (("mixed", "12"), ("single", "1")):
        options = ["--text", str(evaluation_text), "--precisions", "2,4,mix-depth", "--num-prompts", "4", "--max-tokens", "8"]
        run = agreement(
            "record", v1_server.url, *options, "--concurrency", concurrency, "--out", str(tmp_path / f"{name}.json")
        )
        assert run.returncode == 0, run.stdout + run.stderr
    run = agreement("compare", str(tmp_path / "single.json"), str(tmp_path / "mixed.json"))
    assert run.returncode == 0, run.stdout + run.stderr
    assert "of 12 answers are equal" in run.stdout
    answers = json.loads((tmp_path / "mixed.json").read_text())
    by_precision = {p: [a["tokens"] for a in answers if a["precision"] == p] for p in ("2", "4", "mix-depth")}
    assert by_precision["2"] != by_precision["4"] != by_precision["mix-depth"]
