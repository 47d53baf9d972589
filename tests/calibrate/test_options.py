from pathlib import Path

import pytest

from calibrate.evaluate.options import EvaluateOptions
from calibrate.options import CalibrateOptions, parse_stages, parse_width_weights
from matgptq_vllm.core.errors import InputError

MODEL, OUT, TEXT = Path("model"), Path("out"), Path("text")


def test_width_weights_are_parsed():
    assert parse_width_weights("3,4:2, 8:0.5") == {3: 1.0, 4: 2.0, 8: 0.5}
    assert parse_stages("3,4/8:2") == ({3: 1.0, 4: 1.0}, {8: 2.0})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "WIDTH:WEIGHT"),
        ("three", "'three' in 'three'"),
        ("3,,4", "WIDTH:WEIGHT"),
        ("3:x", "WIDTH:WEIGHT"),
        ("5", "one of 2, 3, 4, 6, 8"),
        ("3,3", "twice"),
        ("3:0", "above 0"),
        ("3:-1", "above 0"),
        ("3:nan", "above 0"),
    ],
)
def test_malformed_width_weights_are_refused(text, message):
    with pytest.raises(InputError, match=message):
        parse_width_weights(text)


@pytest.mark.parametrize("text", ["8/3", "3/3,8", "3/6,8/4"])
def test_each_stage_must_begin_wider(text):
    with pytest.raises(InputError, match="begin at a wider width"):
        parse_stages(text)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"group_size": 100}, "group_size 100 is not supported; use one of 32, 64, 128, -1"),
        ({"slice_rule": "floor"}, "use one of nested, round"),
        ({"method": "awq"}, "use one of gptq, rtn"),
        ({"device": "tpu"}, "use one of auto, cpu, cuda"),
        ({"propagate": 5}, "use one of 2, 3, 4, 6, 8"),
        ({"num_samples": 0}, "num_samples is 0; it must be 1 or more"),
        ({"seq_len": 1}, "seq_len is 1; it must be 2 or more"),
        ({"seed": -1}, "seed is -1"),
        ({"damp": 0.0}, "damp is 0.0"),
        ({"damp": float("nan")}, "damp is nan"),
        ({"widths": {}}, "widths is empty"),
        ({"widths": {5: 1.0}}, "width 5 cannot be read"),
        ({"compensate": ()}, "compensate is empty"),
        ({"text": None}, "needs --text FILE"),
    ],
)
def test_calibrate_options_out_of_range_are_refused(changes, message):
    with pytest.raises(InputError, match=message):
        CalibrateOptions(**{"model": MODEL, "out": OUT, "text": TEXT} | changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"width": 5}, "use one of 2, 3, 4, 6, 8"),
        ({"width": 4, "profile": "mix"}, "exclude each other"),
        ({"profile": "no spaces"}, "is not a precision"),
        ({"limit_windows": 0}, "limit_windows is 0"),
    ],
)
def test_evaluate_options_out_of_range_are_refused(changes, message):
    with pytest.raises(InputError, match=message):
        EvaluateOptions(**{"model": MODEL, "text": TEXT} | changes)


def test_the_precision_is_the_width_the_profile_or_all():
    assert EvaluateOptions(MODEL, TEXT, width=4).precision == "4"
    assert EvaluateOptions(MODEL, TEXT, profile="mix").precision == "mix"
    assert EvaluateOptions(MODEL, TEXT).precision is None
