"""What is checked before the harness runs, and how its results are read; tests/e2e/test_tasks.py runs it."""

import sys
from types import ModuleType

import pytest

from calibrate.evaluate import tasks as tasks_module
from calibrate.evaluate.options import EvaluateOptions
from calibrate.evaluate.report import TaskResult
from calibrate.evaluate.tasks import TaskRunner, check_harness, task_results
from matgptq_vllm.core.errors import InputError, UnsupportedError


@pytest.fixture
def harness(monkeypatch):
    """Names of tasks that load; in the place of the harness's task manager, whose index takes seconds to read."""
    indexes = []

    class TaskManager:
        def __init__(self, include_defaults: bool):
            indexes.append(include_defaults)
            self.all_tasks = ["arc_easy", "arc_challenge"]

        def load(self, names):
            if names != ["arc_easy"]:
                raise KeyError("dataset_path\nmore")

    package, module = ModuleType("lm_eval"), ModuleType("lm_eval.tasks")
    module.TaskManager = TaskManager
    monkeypatch.setitem(sys.modules, "lm_eval", package)
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", module)
    return indexes


def test_an_unknown_task_is_refused_with_those_near_it(harness, llama_dir):
    with pytest.raises(
        InputError, match="'arc_esy' is neither the path of a task file nor a task of lm-eval; near it are arc_easy"
    ):
        TaskRunner(EvaluateOptions(llama_dir, tasks=("arc_easy", "arc_esy")))
    assert harness == [True]


def test_a_task_file_that_cannot_be_loaded_is_named(harness, llama_dir, tmp_path):
    path = tmp_path / "task.yaml"
    path.write_text("task: x\n")
    with pytest.raises(InputError, match=r"task\.yaml' cannot be loaded \(KeyError: 'dataset_path"):
        TaskRunner(EvaluateOptions(llama_dir, tasks=(str(path),)))
    assert harness == [False]


def test_without_the_harness_the_package_to_install_is_named(monkeypatch):
    monkeypatch.setattr(tasks_module, "PACKAGES", ("torch", "no_such_package"))
    with pytest.raises(UnsupportedError, match=r'no_such_package not installed\): pip install "matgptq-vllm\[eval\]"'):
        check_harness()


def test_results_are_one_per_metric_and_filter():
    found = {
        "results": {
            "quiz": {
                "alias": "quiz",
                "acc,none": 0.5,
                "acc_stderr,none": 0.1,
                "exact_match,strict": 1,
                "exact_match_stderr,strict": "N/A",
            }
        },
        "n-samples": {"quiz": {"original": 9, "effective": 4}},
    }
    assert task_results(found, "3") == [
        TaskResult("3", "quiz", "acc", 0.5, 0.1, 4),
        TaskResult("3", "quiz", "exact_match,strict", 1.0, None, 4),
    ]
