from pathlib import Path

import pytest

from calibrate.evaluate.options import EvaluateOptions, parse_names, parse_tasks
from calibrate.options import CalibrateOptions, parse_streams, parse_width_weights
from matgptq_vllm.core.errors import InputError

MODEL, OUT, TEXT = Path("model"), Path("out"), Path("text")


def test_width_weights_are_parsed():
    assert parse_width_weights("3,4:2, 8:0.5") == {3: 1.0, 4: 2.0, 8: 0.5}


def test_streams_are_parsed_and_sorted():
    assert parse_streams("4, 2") == (2, 4)
    assert parse_streams("none") == parse_streams("") == ()


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


@pytest.mark.parametrize(("text", "message"), [("3,x", "not a list of widths"), ("5", "width 5"), ("3,3", "twice")])
def test_malformed_streams_are_refused(text, message):
    with pytest.raises(InputError, match=message):
        parse_streams(text)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"group_size": 100}, "group_size 100 is not supported; use one of 32, 64, 128, -1"),
        ({"slice_rule": "floor"}, "use one of nested, curved, round"),
        ({"method": "awq"}, "use one of gptq, rtn"),
        ({"device": "tpu"}, "use one of auto, cpu, cuda"),
        ({"compute_dtype": "float16"}, "use one of auto, float32, bfloat16"),
        ({"num_samples": 0}, "num_samples is 0; it must be 1 or more"),
        ({"seq_len": 1}, "seq_len is 1; it must be 2 or more"),
        ({"seed": -1}, "seed is -1"),
        ({"damp": 0.0}, "damp is 0.0"),
        ({"damp": float("nan")}, "damp is nan"),
        ({"widths": {}}, "widths is empty"),
        ({"widths": {5: 1.0}}, "width 5 cannot be read"),
        ({"streams": (5,)}, "width 5 cannot be read"),
        ({"streams": (3, 3)}, "twice"),
        ({"asymmetry": 1.5}, "asymmetry is 1.5; it must be from 0 to 1"),
        ({"asymmetry": float("nan")}, "asymmetry is nan"),
        ({"sweeps": -1}, "sweeps is -1"),
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
        ({"width": 4, "profile": ("mix",)}, "exclude each other"),
        ({"width": 4, "precision": ("mix",)}, "exclude each other"),
        ({"profile": ("no spaces",)}, "is not a precision"),
        ({"profile": ("4", "mix", "4")}, "profile '4' is there twice"),
        ({"original": MODEL, "no_original": True}, "exclude each other"),
        ({"text": None}, "nothing to measure"),
        ({"url": "http://localhost:1"}, "--url runs lm-eval tasks only"),
        ({"text": None, "tasks": ("arc",), "update_card": True}, "give --text FILE"),
        ({"limit_windows": 0}, "limit_windows is 0"),
        ({"limit_examples": 0}, "limit_examples is 0"),
    ],
)
def test_evaluate_options_out_of_range_are_refused(changes, message):
    with pytest.raises(InputError, match=message):
        EvaluateOptions(**{"model": MODEL, "text": TEXT} | changes)


def test_the_profiles_are_those_of_the_width_the_list_or_all():
    assert EvaluateOptions(MODEL, TEXT, width=4).profile_names == ("4",)
    assert EvaluateOptions(MODEL, TEXT, profile=("mix", "2")).profile_names == ("mix", "2")
    assert EvaluateOptions(MODEL, TEXT, precision=("auto",)).profile_names == ("auto",)
    assert EvaluateOptions(MODEL, TEXT).profile_names is None


def test_lists_on_the_command_line_are_separated_by_commas():
    assert parse_names("4, mix-3.0") == ("4", "mix-3.0")
    assert parse_tasks("arc_easy, dir/my.yaml") == ("arc_easy", "dir/my.yaml")
    with pytest.raises(InputError, match="is not a precision"):
        parse_names("4,")
    with pytest.raises(InputError, match="an empty item"):
        parse_tasks("arc_easy,,hellaswag")
    with pytest.raises(InputError, match="task 'a' is there twice"):
        parse_tasks("a,a")
