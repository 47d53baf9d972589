"""The quality that the shipped model's parent must have, on the shipped evaluation text, which nothing was tuned on."""

from pathlib import Path

import pytest

from calibrate.evaluate.options import EvaluateOptions
from calibrate.evaluate.report import Result
from calibrate.evaluate.run import run_evaluation
from calibrate.options import CalibrateOptions
from calibrate.run import run_calibration

WINDOWS = 24

MOST_INCREASE = {8: 0.005, 6: 0.01, 4: 0.04, 3: 0.15, 2: 0.9}
"""Width -> share by which perplexity may exceed the original's: a parent made from a quarter of the usual text."""


@pytest.fixture(scope="module")
def ours(parent_dir: Path, evaluation_text: Path) -> dict[str, Result]:
    return measure(parent_dir, evaluation_text)


@pytest.fixture(scope="module")
def nearest(tmp_path_factory: pytest.TempPathFactory, example_model: Path, evaluation_text: Path) -> dict[str, Result]:
    """The shipped model rounded to nearest, which a slice cuts short."""
    directory = tmp_path_factory.mktemp("nearest") / "parent"
    run_calibration(CalibrateOptions(example_model, directory, method="rtn", slice_rule="nested"))
    return measure(directory, evaluation_text)


def measure(directory: Path, text: Path) -> dict[str, Result]:
    """Results by precision."""
    return {
        result.precision: result for result in run_evaluation(EvaluateOptions(directory, text, limit_windows=WINDOWS)).results
    }


@pytest.mark.parametrize("width", [8, 6, 4, 3, 2])
def test_perplexity_stays_near_that_of_the_original(width, ours):
    assert ours[str(width)].increase < MOST_INCREASE[width]


@pytest.mark.parametrize("width", [6, 4, 3, 2])
def test_a_narrower_width_is_nearer_to_the_original_than_rounding_to_nearest_and_slicing(width, ours, nearest):
    assert ours[str(width)].kl < nearest[str(width)].kl


@pytest.mark.parametrize("width", [4, 3, 2])
def test_its_perplexity_is_lower_too(width, ours, nearest):
    assert ours[str(width)].perplexity < nearest[str(width)].perplexity
