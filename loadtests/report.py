"""The report of a load test: JSON for programs, CSV for spreadsheets, Markdown for people."""

import csv
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from loadtests.campaign import Campaign, Run
from loadtests.comparison import Ratio, compare
from loadtests.tables import aligned
from loadtests.tables import markdown as table
from loadtests.watch import Check, Sample

VERSION = 1

COLUMNS: dict[str, tuple[str, str]] = {
    # Heading: the number of a run's summary, and its format.
    "requests/s": ("requests_per_s", ".2f"),
    "tokens/s": ("tokens_per_s", ".1f"),
    "TTFT p50": ("ttft.p50", ".0f"),
    "p90": ("ttft.p90", ".0f"),
    "p99": ("ttft.p99", ".0f"),
    "ITL p50": ("itl.p50", ".1f"),
    "p90 ": ("itl.p90", ".1f"),
    "p99 ": ("itl.p99", ".1f"),
    "e2e p50": ("e2e.p50", ".0f"),
    "p90  ": ("e2e.p90", ".0f"),
    "p99  ": ("e2e.p99", ".0f"),
    "goodput/s": ("goodput_per_s", ".2f"),
    "within SLO": ("good_share", ".1%"),
    "mean width": ("mean_width", ".2f"),
    "failed": ("failed", "d"),
}

RUN_HEADING = ["precision", "run", *COLUMNS]


def as_dict(
    campaign: Campaign, interrupted: bool, began: str, samples: Sequence[Sample], verdict: Sequence[Check]
) -> dict[str, Any]:
    """All that was measured, without the single requests.

    Args:
        interrupted: whether runs are missing.
        began: when the test began, ISO 8601.
        samples, verdict: of a soak test.
    """
    options = campaign.options
    return {
        "version": VERSION,
        "began": began,
        "interrupted": interrupted,
        "servers": {name: server.describe() for name, server in campaign.servers.items()},
        "load": {
            "workload": asdict(options.workload),
            "slo": asdict(options.objectives),
            "headers": options.headers,
            "warmups": options.warmups,
        },
        "runs": [_run(run) for run in campaign.runs],
        "comparison": [_ratio(ratio) for ratio in compare(campaign.runs)],
        "soak": {"checks": [asdict(check) for check in verdict], "samples": [asdict(sample) for sample in samples]},
    }


def write(report: Mapping[str, Any], folder: Path) -> None:
    """``report.json``, ``report.csv`` and ``report.md``."""
    (folder / "report.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    with (folder / "report.csv").open("w", encoding="utf-8", newline="") as file:
        rows = [row for run in report["runs"] for row in _flat(run)]
        writer = csv.DictWriter(file, list(rows[0]) if rows else [])
        writer.writeheader()
        writer.writerows(rows)
    (folder / "report.md").write_text(markdown(report), encoding="utf-8")


def markdown(report: Mapping[str, Any]) -> str:
    """Tables of the report; times in milliseconds."""
    workload = report["load"]["workload"]
    slo = ", ".join(f"{name} {value:g} ms" for name, value in report["load"]["slo"].items() if value is not None)
    title = "# Load test" + (" (interrupted: not all runs are here)" if report["interrupted"] else "")
    lines = [
        title,
        "",
        f"Began {report['began']}. Trace {workload['trace']}, seed {workload['seed']}. SLO: {slo or 'none stated'}.",
        "",
    ]
    for name, server in report["servers"].items():
        held = ", ".join(server["precisions"]) or "none: not a replica of MatGPTQ"
        lines.append(f"- {name}: {server['url']}, model {server['model']}, vLLM {server['vllm']}; precisions {held}")
    lines += [
        "",
        "## Runs",
        "",
        "Times in ms; TTFT and end to end (e2e) from when a request was due.",
        "",
        *table(RUN_HEADING, _run_rows(report)),
    ]
    for run in report["runs"]:
        if len(run["parts"]) > 1:
            lines += ["", f"### Precision {run['precision']}, {_where(run)}: by the precision of the answer", ""]
            lines += table(["precision", *COLUMNS], [[name, *_cells(part)] for name, part in run["parts"].items()])
    others = [
        run for run in report["runs"] if any(run["summary"][key] for key in ("cancelled", "refused", "interrupted", "failed"))
    ]
    if others:
        heading = ["precision", "run", "cancelled", "malformed and refused", "interrupted", "failed", "errors"]
        lines += ["", "## Requests that were not completed", "", *table(heading, [_uncompleted(run) for run in others])]
    if report["comparison"]:
        lines += ["", "## Tested server over the other", "", *_comparison(report)]
    if report["soak"]["checks"]:
        rows = [
            [one["name"], one["found"], one["allowed"], "yes" if one["passed"] else "NO"] for one in report["soak"]["checks"]
        ]
        lines += ["", "## Soak", "", *table(["check", "found", "allowed", "passed"], rows)]
    return "\n".join([*lines, ""])


def summary_table(report: Mapping[str, Any]) -> str:
    """The runs, for a terminal."""
    return aligned([RUN_HEADING, *_run_rows(report)])


def _run_rows(report: Mapping[str, Any]) -> list[list[str]]:
    return [[run["precision"], _where(run), *_cells(run["summary"])] for run in report["runs"]]


def _where(run: Mapping[str, Any]) -> str:
    server = "" if run["server"] == "tested" else f"{run['server']}, "
    rate = f"{run['rate_per_s']:.3g}/s" if run["rate"].endswith("%") else f"{run['rate']}/s"
    repeat = f", repeat {run['repeat'] + 1}" if run["repeat"] else ""
    return f"{server}{rate}, {run['concurrency']} in flight{repeat}{', partial' if run['partial'] else ''}"


def _cells(summary: Mapping[str, Any]) -> list[str]:
    return ["" if (value := _number(summary, key)) is None else format(value, spec) for key, spec in COLUMNS.values()]


def _number(summary: Mapping[str, Any], key: str) -> float | None:
    first, _, second = key.partition(".")
    return summary[first][second] if second else summary[first]


def _uncompleted(run: Mapping[str, Any]) -> list[str]:
    summary = run["summary"]
    errors = "; ".join(f"{count} x {text}" for text, count in summary["errors"].items()).replace("|", "/")
    counts = [str(summary[key]) for key in ("cancelled", "refused", "interrupted", "failed")]
    return [run["precision"], _where(run), *counts, errors]


def _comparison(report: Mapping[str, Any]) -> list[str]:
    rows = []
    for one in report["comparison"]:
        bounds = "" if one["low"] is None else f"{one['low']:.3f} to {one['high']:.3f}"
        where = f"{one['rate']}/s, {one['concurrency']} in flight"
        rows.append([one["precision"], where, one["number"], f"{one['ratio']:.3f}", bounds, str(one["repeats"])])
    return table(["precision", "run", "number", "ratio", "95% interval", "repeats"], rows)


def _run(run: Run) -> dict[str, Any]:
    return {
        "server": run.server,
        **_cell(run),
        "repeat": run.repeat,
        "rate_per_s": "inf" if run.rate_per_s == float("inf") else run.rate_per_s,
        "partial": run.partial,
        "began_s": run.began_s,
        "summary": asdict(run.summary),
        "parts": {name: asdict(part) for name, part in run.parts.items()},
    }


def _ratio(ratio: Ratio) -> dict[str, Any]:
    numbers = {"number": ratio.number, "ratio": ratio.ratio, "low": ratio.low, "high": ratio.high, "repeats": ratio.repeats}
    return {**_cell(ratio), **numbers}


def _cell(of: Run | Ratio) -> dict[str, Any]:
    return {"precision": of.cell.precision, "rate": str(of.cell.rate), "concurrency": of.cell.concurrency}


def _flat(run: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A run's row of the CSV, and one for each precision in it if there are several."""
    head = {key: value for key, value in run.items() if key not in ("summary", "parts")}
    parts = run["parts"] if len(run["parts"]) > 1 else {}
    rows = []
    for name, summary in [("", run["summary"]), *parts.items()]:
        row = {**head, "answered_at": name}
        for key, value in summary.items():
            if key in ("errors", "tokens"):
                row[key] = json.dumps(value)
            elif isinstance(value, dict):
                row |= {f"{key}_{name}_ms": number for name, number in value.items()}
            else:
                row[key] = value
        rows.append(row)
    return rows
