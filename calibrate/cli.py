"""The verbs calibrate, evaluate and inspect of the ``matgptq`` command. Importing this file imports no torch."""

import argparse
import json

from calibrate.evaluate.options import EvaluateOptions
from calibrate.option_fields import add_arguments, from_namespace
from calibrate.options import CalibrateOptions, InspectOptions


def add_verbs(subparsers: argparse._SubParsersAction) -> None:
    """Register the verbs; each sets ``run``, a function from parsed arguments to an exit status."""
    for name, verb, run in (
        ("calibrate", CalibrateOptions, run_calibrate),
        ("evaluate", EvaluateOptions, run_evaluate),
        ("inspect", InspectOptions, run_inspect),
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
        print(f"wrote {run_calibration(options)}")
    return 0


def run_evaluate(namespace: argparse.Namespace) -> int:
    """Measure perplexity and print it."""
    options = from_namespace(EvaluateOptions, namespace)
    from calibrate.evaluate.report import as_json, as_table
    from calibrate.evaluate.run import run_evaluation

    _quiet_transformers()
    results = run_evaluation(options)
    print(as_json(results, single=options.precision is not None or len(results) == 1) if options.json else as_table(results))
    return 0


def run_inspect(namespace: argparse.Namespace) -> int:
    """Describe a parent."""
    options = from_namespace(InspectOptions, namespace)
    from calibrate.inspect import as_text, describe_parent

    description = describe_parent(options)
    print(json.dumps(description, indent=1) if options.json else as_text(description))
    return 0


def _quiet_transformers() -> None:
    """Leave the terminal to our own progress bars."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
