"""The quality that the shipped model's parent must have, on the shipped evaluation text, which nothing was tuned on."""

from collections.abc import Callable
from pathlib import Path

import pytest

from calibrate.evaluate.options import EvaluateOptions
from calibrate.evaluate.run import run_evaluation
from calibrate.options import CalibrateOptions
from calibrate.run import run_calibration

WINDOWS = 24


@pytest.fixture(scope="module")
def measure(evaluation_text: Path) -> Callable[..., float]:
    """Function from a folder, and a width of it, to perplexity."""

    def perplexity(directory: Path, width: int | None = None) -> float:
        options = EvaluateOptions(directory, evaluation_text, width=width, no_original=True, limit_windows=WINDOWS)
        (result,) = run_evaluation(options).results
        return result.perplexity

    return perplexity


@pytest.fixture(scope="module")
def nearest_dir(tmp_path_factory: pytest.TempPathFactory, example_model: Path) -> Path:
    """The shipped model rounded to nearest, which a slice cuts short."""
    directory = tmp_path_factory.mktemp("nearest") / "parent"
    return run_calibration(CalibrateOptions(example_model, directory, method="rtn"))


def test_width_8_is_within_one_and_a_half_percent_of_the_original(measure, parent_dir, example_model):
    assert measure(parent_dir, 8) < 1.015 * measure(example_model)


@pytest.mark.parametrize("width", [6, 4, 3, 2])
def test_a_narrower_width_is_better_than_rounding_to_nearest_and_slicing(width, measure, parent_dir, nearest_dir):
    assert measure(parent_dir, width) < measure(nearest_dir, width)
