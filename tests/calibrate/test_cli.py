import argparse
import json
import subprocess
import sys

import pytest

from calibrate.cli import add_verbs
from calibrate.option_fields import from_namespace
from calibrate.options import CalibrateOptions
from calibrate.run import run_calibration
from matgptq_vllm.core.errors import FormatError, InputError


def parse(*arguments: object) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_verbs(parser.add_subparsers(required=True))
    return parser.parse_args([str(argument) for argument in arguments])


def run(*arguments: object) -> int:
    namespace = parse(*arguments)
    return namespace.run(namespace)


def test_importing_the_command_line_imports_no_torch():
    code = "import sys, calibrate.cli; print([name for name in ('torch', 'transformers', 'vllm') if name in sys.modules])"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "[]"


def test_defaults_on_the_command_line_are_those_of_the_options(tmp_path):
    namespace = parse("calibrate", "m", "--out", "o", "--text", "t")
    paths = (type(tmp_path)(name) for name in "mot")
    assert from_namespace(CalibrateOptions, namespace) == CalibrateOptions(*paths)


def test_every_option_reaches_the_calibration():
    arguments = "--text t --num-samples 3 --seq-len 7 --group-size -1 --slice-rule round --widths 3,8:2 --streams 3"
    more = (
        "--damp 0.1 --asymmetry 1 --sweeps 2 --seed 5 --method rtn --overwrite --restart --compute-dtype bfloat16 --device cpu"
    )
    options = from_namespace(
        CalibrateOptions, parse("calibrate", "m", "--out", "o", *arguments.split(), *more.split(), "--dry-run")
    )
    assert (options.num_samples, options.seq_len, options.group_size, options.slice_rule) == (3, 7, -1, "round")
    assert options.widths == {3: 1.0, 8: 2.0}
    assert (options.streams, options.damp, options.asymmetry, options.sweeps, options.seed) == ((3,), 0.1, 1.0, 2, 5)
    assert (options.method, options.overwrite, options.restart) == ("rtn", True, True)
    assert (options.compute_dtype, options.device, options.dry_run) == ("bfloat16", "cpu", True)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--group-size", "sixty"], "--group-size 'sixty' is not a number; use one of 32, 64, 128, -1"),
        (["--num-samples", "many"], "--num-samples 'many' is not a number"),
        (["--group-size", "48"], "use one of 32, 64, 128, -1"),
        (["--widths", "5"], "width 5"),
        (["--streams", "two"], "streams 'two' is not a list of widths"),
    ],
)
def test_nonsense_is_refused_with_what_is_allowed(arguments, message):
    with pytest.raises(InputError, match=message):
        run("calibrate", "m", "--out", "o", "--text", "t", *arguments)


def test_help_shows_every_default(capsys):
    with pytest.raises(SystemExit):
        parse("calibrate", "--help")
    text = " ".join(capsys.readouterr().out.split())
    assert "(default: 256)" in text
    assert "--group-size 32|64|128|-1" in text


def test_dry_run_prints_the_plan_and_writes_nothing(tiny_options, capsys):
    options = tiny_options()
    short = ["--num-samples", "3", "--seq-len", "16", "--dry-run"]
    assert run("calibrate", options.model, "--text", options.text, "--out", options.out, *short) == 0
    assert "would calibrate 14 linear layers" in capsys.readouterr().out
    assert not options.out.exists()


def test_the_three_verbs_work_together(tiny_options, capsys):
    options = tiny_options()
    short = ["--num-samples", "4", "--seq-len", "32", "--group-size", "32"]
    assert run("calibrate", options.model, "--text", options.text, "--out", options.out, *short) == 0
    assert capsys.readouterr().out == f"wrote {options.out}\n"
    measure = ["evaluate", options.out, "--text", options.text, "--seq-len", "32", "--limit-windows", "5"]
    run(*measure, "--json")
    report = json.loads(capsys.readouterr().out)
    records = report["results"]
    assert report["original"]["precision"] == "original, bfloat16"
    assert [record["precision"] for record in records] == ["2", "3", "4", "6", "8"]
    assert [record["bits_per_weight"] for record in records] == [2, 3, 4, 6, 8]
    run(*measure, "--json", "--width", "4", "--no-original")
    (alone,) = json.loads(capsys.readouterr().out)["results"]
    assert (alone["perplexity"], alone["kl"]) == (records[2]["perplexity"], None)
    run(*measure, "--profile", "8,3")
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == ["precision", "original,", "8", "3"]
    run("inspect", options.out, "--verify", "--json")
    description = json.loads(capsys.readouterr().out)
    assert description["profiles"]["4"]["weight_bytes"] == records[2]["weight_bytes"]
    run("inspect", options.out, "--verify")
    assert "tensors are what calibration wrote" in capsys.readouterr().out


def test_a_plain_model_is_measured_as_it_is_and_has_no_widths(llama_dir, text_file, capsys):
    measure = ["evaluate", llama_dir, "--text", text_file, "--seq-len", "32", "--limit-windows", "5", "--json"]
    run(*measure)
    report = json.loads(capsys.readouterr().out)
    (record,) = report["results"]
    assert (record["precision"], record["bits_per_weight"], report["tokens"]) == ("bfloat16", 16, 5 * 31)
    assert (report["original"], report["notes"]) == (None, [])
    with pytest.raises(InputError, match="is not a parent and has no precision '4'"):
        run(*measure, "--width", "4")


def test_what_is_no_model_or_no_parent_is_refused(llama_dir, text_file, tmp_path):
    with pytest.raises(InputError, match=r"has no config\.json"):
        run("evaluate", tmp_path, "--text", text_file)
    with pytest.raises(FormatError, match="not a parent"):
        run("inspect", llama_dir)


def test_an_altered_parent_is_found_by_verify(tiny_options):
    directory = run_calibration(tiny_options())
    path = directory / "planes/plane2-00001-of-00001.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(bytes(content))
    run("inspect", directory)
    with pytest.raises(
        FormatError, match=r"planes/plane2-00001-of-00001\.safetensors: tensor .* is not what calibration wrote"
    ):
        run("inspect", directory, "--verify")
