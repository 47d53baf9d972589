"""The verbs of the ``matgptq`` command that this package has. Importing this file imports no torch."""

import argparse
import json
import os

from calibrate.evaluate.options import EvaluateOptions
from calibrate.exchange.options import ExportOptions, ImportOptions
from calibrate.option_fields import add_arguments, from_namespace
from calibrate.options import CalibrateOptions, FetchOptions, InspectOptions
from calibrate.search.options import SearchOptions


def add_verbs(subparsers: argparse._SubParsersAction) -> None:
    """Register the verbs; each sets ``run``, a function from parsed arguments to an exit status."""
    for name, verb, run in (
        ("calibrate", CalibrateOptions, run_calibrate),
        ("search", SearchOptions, run_search),
        ("evaluate", EvaluateOptions, run_evaluate),
        ("inspect", InspectOptions, run_inspect),
        ("fetch", FetchOptions, run_fetch),
        ("import", ImportOptions, run_import),
        ("export", ExportOptions, run_export),
    ):
        parser = subparsers.add_parser(name, help=verb.__doc__, description=verb.__doc__)
        add_arguments(parser, verb, positional=("model",))
        parser.set_defaults(run=run)


def run_calibrate(namespace: argparse.Namespace) -> int:
    """Calibrate, or print the plan."""
    options = from_namespace(CalibrateOptions, namespace)
    from calibrate.run import plan, run_calibration

    _quiet_transformers()
    if options.dry_run:
        print(plan(options))
    else:
        directory = run_calibration(options)
        if os.environ.get("RANK", "0") == "0":  # of the processes that torchrun starts, one speaks
            print(f"wrote {directory}")
    return 0


def run_search(namespace: argparse.Namespace) -> int:
    """Search for profiles and add them to the parent, or print the plan."""
    options = from_namespace(SearchOptions, namespace)
    from calibrate.search import run
    from calibrate.search.report import as_json_values, as_table

    _quiet_transformers()
    if options.dry_run:
        print(run.plan(options))
        return 0
    report = run.run_search(options)
    print(json.dumps(as_json_values(report), indent=1) if options.json else as_table(report))
    return 0


def run_evaluate(namespace: argparse.Namespace) -> int:
    """Measure quality and print the report."""
    options = from_namespace(EvaluateOptions, namespace)
    from calibrate.evaluate.report import as_json, as_text
    from calibrate.evaluate.run import run_evaluation

    _quiet_transformers()
    report = run_evaluation(options)
    print(as_json(report) if options.json else as_text(report))
    return 0


def run_inspect(namespace: argparse.Namespace) -> int:
    """Describe a parent."""
    options = from_namespace(InspectOptions, namespace)
    from calibrate.inspect import as_text, describe_parent

    description = describe_parent(options)
    print(json.dumps(description, indent=1) if options.json else as_text(description))
    return 0


def run_fetch(namespace: argparse.Namespace) -> int:
    """Copy or download the part of a parent that a width needs."""
    options = from_namespace(FetchOptions, namespace)
    from calibrate.fetch import fetch

    directory, ours, left_out = fetch(options)
    held, left = f"{ours / 1e6:,.1f} MB of weights", f"{left_out / 1e6:,.1f} MB left out"
    print(f"{directory}: {held}, for widths up to {options.max_width}; {left}")
    return 0


def run_import(namespace: argparse.Namespace) -> int:
    """Import a published checkpoint, or print what would be."""
    options = from_namespace(ImportOptions, namespace)
    from calibrate.exchange import import_run

    _quiet_transformers()
    report = import_run.run_import(options)
    print(report.as_json() if options.json else report.as_text("would write" if options.dry_run else "wrote"))
    return 0


def run_export(namespace: argparse.Namespace) -> int:
    """Export a slice, or print the plan."""
    options = from_namespace(ExportOptions, namespace)
    from calibrate.exchange import export_plan, export_run

    _quiet_transformers()
    if options.dry_run:
        print(export_plan.describe_plan(options))
    else:
        report = export_run.run_export(options)
        print(report.as_json() if options.json else report.as_text())
    return 0


def _quiet_transformers() -> None:
    """Leave the terminal to our own progress bars."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
