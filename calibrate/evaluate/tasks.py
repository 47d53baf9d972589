"""Tasks of lm-eval (the extra ``eval``), on a model in this process or through a running server."""

import contextlib
import difflib
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from calibrate.data import load_tokenizer
from calibrate.evaluate.options import EvaluateOptions
from calibrate.evaluate.report import TaskResult
from calibrate.evaluate.server import ask_server
from matgptq_vllm.core.errors import InputError, UnsupportedError

PACKAGES = ("lm_eval", "accelerate", "aiohttp", "tenacity")
"""What the harness and the two ways to run a model need."""

BATCH_SIZE = 8
"""Sequences per forward pass of a model in this process; results do not depend on it beyond rounding."""

NO_FILTER = ",none"
"""How the harness marks a metric of answers taken as they are."""


def check_harness() -> None:
    """UnsupportedError if lm-eval, or what it needs, is not installed."""
    absent = [name for name in PACKAGES if find_spec(name) is None]
    if absent:
        raise UnsupportedError(f'--tasks needs lm-eval ({", ".join(absent)} not installed): pip install "matgptq-vllm[eval]"')


class TaskRunner:
    """Runs the tasks that ``options`` name.

    Raises:
        InputError: a task does not exist or cannot be loaded.
    """

    def __init__(self, options: EvaluateOptions):
        assert options.tasks is not None
        self._options = options
        self._tasks = list(options.tasks)
        self._tokenizer = load_tokenizer(options.model)
        # Told to both ways to run a model, whose defaults differ: the same text has to be the same tokens.
        self._add_bos = bool(self._tokenizer("")["input_ids"])
        self._manager = _load(self._tasks)

    def on_model(self, model: PreTrainedModel, precision: str) -> list[TaskResult]:
        """Run the tasks on ``model``, calling it ``precision`` in the results."""
        from lm_eval.models.huggingface import HFLM

        return self._run(
            HFLM(pretrained=model, tokenizer=self._tokenizer, add_bos_token=self._add_bos, batch_size=BATCH_SIZE), precision
        )

    def through_server(self, url: str) -> list[TaskResult]:
        """Run the tasks through the server at ``url``, at every precision asked for, or at all that it holds."""
        from calibrate.evaluate.endpoint import PrecisionEndpoint

        server = ask_server(url)
        precisions = self._options.profile_names or server.precisions
        for precision in precisions:
            server.check_precision(precision)
        results = []
        for precision in precisions:
            endpoint = PrecisionEndpoint(server, precision, str(self._options.model), self._add_bos, self._options.concurrency)
            results += self._run(endpoint, precision)
        return results

    def _run(self, lm: Any, precision: str) -> list[TaskResult]:
        from lm_eval import simple_evaluate

        # The harness prints while it works; standard output is for the report.
        with contextlib.redirect_stdout(sys.stderr):
            found: Any = simple_evaluate(
                lm,
                tasks=self._tasks,
                task_manager=self._manager,
                limit=self._options.limit_examples,
                log_samples=False,
            )
        return task_results(found, precision)


def task_results(found: dict[str, Any], precision: str) -> list[TaskResult]:
    """The metrics in what ``lm_eval.simple_evaluate`` returns, in its order."""
    results = []
    for task, values in found["results"].items():
        examples = found["n-samples"].get(task, {}).get("effective", 0)
        for key, value in values.items():
            metric, _, filtered = key.partition(",")
            if not filtered or metric.endswith("_stderr"):
                continue
            stderr = values.get(f"{metric}_stderr,{filtered}")
            results.append(
                TaskResult(
                    precision=precision,
                    task=task,
                    metric=key.removesuffix(NO_FILTER),
                    value=float(value),
                    stderr=float(stderr) if isinstance(stderr, int | float) else None,
                    examples=int(examples),
                )
            )
    return results


def _load(tasks: list[str]) -> Any:
    """A task manager that has loaded ``tasks`` once; InputError names the one that it could not load."""
    from lm_eval.tasks import TaskManager

    # Reading the index of the harness's own tasks takes seconds, and files alone do not need it.
    manager = TaskManager(include_defaults=not all(Path(task).is_file() for task in tasks))
    for task in tasks:
        if not Path(task).is_file() and task not in manager.all_tasks:
            near = difflib.get_close_matches(task, manager.all_tasks, n=4)
            hint = f"; near it are {', '.join(near)}" if near else ""
            raise InputError(f"{task!r} is neither the path of a task file nor a task of lm-eval{hint}")
        try:
            manager.load([task])
        except Exception as error:  # the harness and datasets raise whatever their parsers and downloads raise
            first_line = (str(error).strip().splitlines() or [""])[0]
            raise InputError(
                f"task {task!r} cannot be loaded ({type(error).__name__}: {first_line}); check its file and that its data set "
                "can be read"
            ) from error
    return manager
