import argparse
from dataclasses import replace
from pathlib import Path

import pytest

from calibrate.option_fields import add_arguments, from_namespace
from calibrate.search.budget import parse_budgets
from calibrate.search.evolution import Stage
from calibrate.search.options import SearchOptions, parse_stages
from matgptq_vllm.core.errors import InputError


def parse(*arguments):
    parser = argparse.ArgumentParser()
    add_arguments(parser, SearchOptions, positional=("model",))
    return from_namespace(SearchOptions, parser.parse_args([str(argument) for argument in arguments]))


def plain(**changes):
    return replace(SearchOptions(Path("m"), parse_budgets("3.0"), Path("t")), **changes)


def test_defaults_on_the_command_line_are_those_of_the_options():
    assert parse("m", "--budget", "3.0", "--text", "t") == plain()


def test_every_option_reaches_the_search():
    options = parse(
        "m", "--budget", "2.5ms", "--text", "t", "--original", "o", "--name", "fast", "--overwrite", "--restart",
        "--bandwidth", "4TB/s", "--num-samples", 64, "--seq-len", 32, "--generations", 3, "--offspring", 5,
        "--selection", "2:3,9:1", "--patience", 2, "--sensitivity-samples", 0, "--seed", 7, "--held-out", 0,
        "--held-out-samples", 3, "--held-out-seq-len", 16, "--memory", "1MiB", "--device", "cpu", "--dtype", "float32",
        "--dry-run", "--json",
    )  # fmt: skip
    assert options.names == ("fast",)
    assert (options.original, options.overwrite, options.restart) == (Path("o"), True, True)
    assert options.bandwidth == 4 * 10**12
    assert options.stages == (Stage(2, 3), Stage(9, 1))
    settings = options.settings
    assert (settings.generations, settings.offspring, settings.num_windows, settings.patience, settings.seed) == (
        3,
        5,
        64,
        2,
        7,
    )
    assert (options.seq_len, options.sensitivity_samples, options.held_out) == (32, 0, 0)
    assert (options.held_out_samples, options.held_out_seq_len, options.kept_bytes) == (3, 16, 1 << 20)
    assert (options.device, options.dtype, options.dry_run, options.json) == ("cpu", "float32", True, True)


def test_profiles_are_named_after_their_budgets():
    assert plain(budget=parse_budgets("2.5,500MiB,800µs")).names == ("mix-2.5", "mix-500MiB", "mix-800us")


@pytest.mark.parametrize("num_samples", [1, 2, 3, 8, 16, 17, 128])
@pytest.mark.parametrize("offspring", [1, 2, 16, 64])
def test_the_default_selection_suits_any_number_of_windows_and_children(num_samples, offspring):
    stages = plain(num_samples=num_samples, offspring=offspring).stages
    assert all(stage.windows <= num_samples for stage in stages)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_samples": 0}, "num_samples is 0"),
        ({"seq_len": 1}, "seq_len is 1"),
        ({"offspring": 0}, "offspring"),
        ({"held_out": 1.0}, "held_out"),
        ({"held_out": float("nan")}, "held_out"),
        ({"device": "tpu"}, "use one of auto, cpu, cuda"),
        ({"dtype": "float16"}, "use one of auto, float32, bfloat16"),
        ({"name": "3"}, "cannot be called '3'"),
        ({"name": "auto"}, "cannot be called 'auto'"),
        ({"name": "a b"}, "is not a precision"),
        ({"name": "x", "budget": parse_budgets("2.5,3.0")}, "names one profile, but 2 budgets"),
        ({"bandwidth": 5}, "--bandwidth is for a budget of time"),
        ({"times": Path("x")}, "--times is for a budget of time"),
        ({"times": Path("x"), "bandwidth": 5, "budget": parse_budgets("1ms")}, "exclude each other"),
        ({"selection": (Stage(200, 3),)}, "compares on 200 windows; there are 128"),
        ({"selection": (Stage(8, 3), Stage(8, 2))}, "8:2 after 8:3"),
        ({"selection": (Stage(8, 3), Stage(9, 4))}, "9:4 after 8:3"),
        ({"selection": (Stage(8, 0),)}, "survivors"),
    ],
)
def test_what_makes_no_sense_is_refused(changes, message):
    with pytest.raises(InputError, match=message):
        plain(**changes)


@pytest.mark.parametrize("text", ["", "8", "8:", ":3", "8:3,", "a:b"])
def test_a_selection_that_cannot_be_read_is_refused(text):
    with pytest.raises(InputError, match="WINDOWS:SURVIVORS"):
        parse_stages(text)
