"""Do eager mode and graph mode answer alike, alone and in mixed batches? ``python -m loadtests.modes PARENT --text FILE``.

For each mode a server is started on PARENT, and asked for greedy continuations of the same prompts at every precision
(``loadtests.agreement``): one request at a time, and with as many in flight as each of ``--in-flight`` says, of mixed
precisions. Everything is compared with the first mode's requests alone. The records, ``report.json`` and the servers' logs
stay in ``--out``; a table is printed. Arguments after ``--`` go to every server. Works on a GPU and on a CPU alike; on a CPU,
graph mode is torch.compile without code generation.
"""

import argparse
import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import httpx

from loadtests.agreement import Answer, Comparison, compare, prompts_of, record
from loadtests.tables import aligned

MODES: Mapping[str, tuple[tuple[str, ...], Mapping[str, str]]] = {
    # Name: arguments and environment of the server.
    "eager": (("--enforce-eager",), {}),
    # The variable counts on a CPU only: there it makes dynamo's graphs run as they are, which compile in seconds.
    "graphs": ((), {"VLLM_CPU_CI_ENV": "1"}),
}
START_TIMEOUT_S = 1800
"""Graphs of a large model take minutes to capture."""


@dataclass(frozen=True)
class Row:
    """How the answers at one precision of one run compare with those of the first mode alone."""

    mode: str
    in_flight: int
    precision: str
    result: Comparison

    def cells(self, tolerance: float) -> list[str]:
        """As the table shows it."""
        parted = self.result.parted
        return [
            *(self.mode, str(self.in_flight), self.precision, str(self.result.equal), str(len(parted))),
            *(f"{max(parted):.4f}" if parted else "-", str(self.result.beyond(tolerance))),
            f"{self.result.largest_difference:.4f}",
        ]


HEADINGS = ["mode", "in flight", "precision", "equal", "parted", "largest gap", "beyond", "logprob difference"]


def rows_of(mode: str, in_flight: int, reference: Sequence[Answer], answers: Sequence[Answer]) -> list[Row]:
    """One row per precision, in the order of their first answers."""
    return [
        Row(mode, in_flight, precision, compare(_at(precision, reference), _at(precision, answers)))
        for precision in dict.fromkeys(answer.precision for answer in reference)
    ]


def failed(rows: Sequence[Row], tolerance: float, max_parted: float) -> list[str]:
    """Why the rows are not good enough; nothing if they are.

    Args:
        tolerance: of logprob, by which two candidates may differ where answers part.
        max_parted: share of a run's answers that may part at all, that is of all precisions together.
    """
    found = []
    for mode, in_flight in dict.fromkeys((row.mode, row.in_flight) for row in rows):
        results = [row.result for row in rows if (row.mode, row.in_flight) == (mode, in_flight)]
        parted = sum(len(result.parted) for result in results)
        total = parted + sum(result.equal for result in results)
        beyond = sum(result.beyond(tolerance) for result in results)
        if beyond:
            found.append(f"{mode}, {in_flight} in flight: {beyond} of {total} answers part by {tolerance} or more")
        if parted >= max_parted * total and parted:
            found.append(f"{mode}, {in_flight} in flight: {parted} of {total} answers part; less than {max_parted:.0%} may")
    return found


@contextmanager
def server(parent: str, mode: str, arguments: Sequence[str], log: Path) -> Iterator[str]:
    """URL of a server of ``parent`` in ``mode``, which runs within the block; ValueError if it does not start."""
    options, environment = MODES[mode]
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [
        *(sys.executable, "-m", "matgptq_vllm.cli", "serve", parent, "--host", "127.0.0.1", "--port", str(port)),
        *("--sweep-seconds", "0", *options, *arguments),
    ]
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env={**os.environ, **environment})
    try:
        url = f"http://127.0.0.1:{port}"
        deadline = time.monotonic() + START_TIMEOUT_S
        while not _healthy(url):
            if process.poll() is not None or time.monotonic() > deadline:
                raise ValueError(f"the server of mode {mode} did not start; see {log}")
            time.sleep(0.5)
        yield url
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGINT)
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns 1 if the modes do not agree, 2 if they could not be asked."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    end = arguments.index("--") if "--" in arguments else len(arguments)
    own, of_server = arguments[:end], arguments[end + 1 :]
    parser = argparse.ArgumentParser(
        prog="python -m loadtests.modes", description="Do eager and graph mode answer alike, alone and in mixed batches?"
    )
    parser.add_argument("parent", help="folder of a parent")
    parser.add_argument("--text", type=Path, required=True, help="UTF-8 text to take prompts from")
    parser.add_argument("--out", type=Path, default=Path("modes"), help="folder to write (default: %(default)s)")
    parser.add_argument("--modes", default=",".join(MODES), help="the first is compared with (default: %(default)s)")
    parser.add_argument("--precisions", default="2,3,4,6,8", help="comma-separated (default: %(default)s)")
    parser.add_argument("--in-flight", default="256", help="requests in flight of the mixed runs (default: %(default)s)")
    parser.add_argument("--num-prompts", type=int, default=52, help="each at every precision (default: %(default)s)")
    parser.add_argument("--prompt-words", type=int, default=40, help="words of each (default: %(default)s)")
    parser.add_argument("--max-tokens", type=int, default=24, help="tokens of each answer (default: %(default)s)")
    parser.add_argument("--tolerance", type=float, default=0.05, help="of logprobs where answers part (default: %(default)s)")
    parser.add_argument("--max-parted", type=float, default=0.02, help="share of answers that may part (default: %(default)s)")
    given = parser.parse_args(own)
    try:
        prompts = prompts_of(given.text.read_text(encoding="utf-8"), given.num_prompts, given.prompt_words)
        in_flight = [1, *map(int, given.in_flight.split(","))]
        given.out.mkdir(parents=True, exist_ok=True)
        rows: list[Row] = []
        reference: list[Answer] = []
        modes = given.modes.split(",")
        if unknown := [mode for mode in modes if mode not in MODES]:
            raise ValueError(f"{unknown[0]!r} is not a mode; there are {', '.join(MODES)}")
        for mode in modes:
            # Without the prefix cache, so that every run computes its prompts.
            of_mode = ["--no-enable-prefix-caching", "--max-num-seqs", str(max(in_flight)), *of_server]
            with server(given.parent, mode, of_mode, given.out / f"{mode}.log") as url:
                for number in in_flight:
                    answers = asyncio.run(record(url, prompts, given.precisions.split(","), given.max_tokens, number, None))
                    _write(given.out / f"{mode}-{number}.json", [asdict(answer) for answer in answers])
                    reference = reference or answers
                    if answers is not reference:
                        rows += rows_of(mode, number, reference, answers)
    except (OSError, ValueError, httpx.HTTPError) as error:
        print(f"loadtests: {error}", file=sys.stderr)
        return 2
    _write(given.out / "report.json", [{**asdict(row), "beyond": row.result.beyond(given.tolerance)} for row in rows])
    print(aligned([HEADINGS, *(row.cells(given.tolerance) for row in rows)]))
    problems = failed(rows, given.tolerance, given.max_parted)
    for problem in problems:
        print(f"loadtests: {problem}", file=sys.stderr)
    return int(bool(problems))


def _at(precision: str, answers: Sequence[Answer]) -> list[Answer]:
    return [answer for answer in answers if answer.precision == precision]


def _write(path: Path, document: object) -> None:
    path.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


def _healthy(url: str) -> bool:
    try:
        return httpx.get(f"{url}/health", timeout=2).status_code == 200
    except httpx.TransportError:
        return False


if __name__ == "__main__":
    sys.exit(main())
