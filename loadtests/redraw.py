"""Draw the pictures of a finished load test: ``python -m loadtests.redraw DIR``, where the test ran without matplotlib."""

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from loadtests.campaign import Cell, Run
from loadtests.options import parse_rate
from loadtests.plots import draw
from loadtests.records import read_records
from loadtests.statistics import Quantiles, Summary
from loadtests.watch import Sample


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the pictures beside the report; returns 2 if there is none."""
    parser = argparse.ArgumentParser(prog="python -m loadtests.redraw", description=__doc__)
    parser.add_argument("folder", type=Path, help="--out of a load test, with report.json and runs/")
    folder = parser.parse_args(arguments).folder
    try:
        report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
        runs = [run_of(entry, folder / "runs" / f"{number:03d}.jsonl") for number, entry in enumerate(report["runs"])]
        samples = [Sample(**entry) for entry in report["soak"]["samples"]]
    except (KeyError, TypeError, ValueError, OSError) as error:
        print(f"redraw: {folder} is not the folder of a load test: {error!r}", file=sys.stderr)
        return 2
    for path in draw(runs, samples, folder):
        print(path)
    return 0


def run_of(entry: Mapping[str, Any], records: Path) -> Run:
    """A run from its entry in a report and the file of its requests."""
    cell = Cell(entry["precision"], parse_rate("rate", entry["rate"]), entry["concurrency"])
    parts = {name: _summary(part) for name, part in entry["parts"].items()}
    summary, rate = _summary(entry["summary"]), float(entry["rate_per_s"])
    return Run(
        entry["server"],
        cell,
        entry["repeat"],
        rate,
        entry["partial"],
        summary,
        parts,
        entry["began_s"],
        0.0,
        read_records(records),
    )


def _summary(entry: Mapping[str, Any]) -> Summary:
    latencies = {name: Quantiles(**entry[name]) for name in ("ttft", "itl", "tpot", "e2e")}
    return Summary(**{**entry, **latencies})


if __name__ == "__main__":
    sys.exit(main())
