"""Whole evaluations of a tiny parent: what they report, what they write, and what they refuse."""

import json
import math
import shutil
import sys
from pathlib import Path

import pytest
from transformers import LlamaConfig

from calibrate.data import load_tokenizer
from calibrate.evaluate import run as run_module
from calibrate.evaluate import subject
from calibrate.evaluate.options import EvaluateOptions
from calibrate.evaluate.run import run_evaluation
from calibrate.options import CalibrateOptions
from calibrate.run import run_calibration
from matgptq_vllm.core.checkpoint import ParentReader
from matgptq_vllm.core.checkpoint_writer import write_profiles
from matgptq_vllm.core.errors import InputError, UnsupportedError
from matgptq_vllm.core.profile import Profile
from matgptq_vllm.core.quality import QUALITY_FILE, read_perplexities

from .conftest import SIZES

MEASURE = {"seq_len": 32, "limit_windows": 6}


@pytest.fixture(scope="module")
def finished(tmp_path_factory, llama_dir, text_file) -> Path:
    out = tmp_path_factory.mktemp("evaluation") / "parent"
    run_calibration(CalibrateOptions(llama_dir, out, text_file, num_samples=12, seq_len=32, group_size=32))
    layers = ParentReader(out).layers
    write_profiles(out, [Profile("mix-3.0", {name: 2 if "layers.0" in name else 4 for name in layers})])
    return out


@pytest.fixture
def parent(finished, tmp_path) -> Path:
    """A parent with a mixed profile, which a test may alter."""
    shutil.copytree(finished, tmp_path / "parent")
    return tmp_path / "parent"


def test_every_profile_is_compared_with_the_model_it_was_calibrated_from(parent, llama_dir, text_file):
    report = run_evaluation(EvaluateOptions(parent, text_file, **MEASURE))
    assert [result.precision for result in report.results] == ["2", "3", "4", "6", "8", "mix-3.0"]
    assert (report.original_model, report.notes) == (str(llama_dir), [])
    (plain,) = run_evaluation(EvaluateOptions(llama_dir, text_file, **MEASURE)).results
    assert report.original.perplexity == plain.perplexity
    for result in report.results:
        assert result.increase == pytest.approx(result.perplexity / plain.perplexity - 1)
    by_name = {result.precision: result for result in report.results}
    kls = [by_name[name].kl for name in ("8", "6", "4", "2")]
    assert kls == sorted(kls)
    assert by_name["4"].kl < by_name["mix-3.0"].kl < by_name["2"].kl
    assert 0 < by_name["2"].top1_agreement < by_name["8"].top1_agreement <= 1


def test_a_profile_measured_alone_is_what_it_is_among_others(parent, text_file):
    alone = run_evaluation(EvaluateOptions(parent, text_file, profile=("mix-3.0",), **MEASURE))
    after_another = run_evaluation(EvaluateOptions(parent, text_file, profile=("8", "mix-3.0"), **MEASURE))
    assert alone.results[0] == after_another.results[1]


@pytest.mark.parametrize("missing", ["log", "model", "option"])
def test_without_an_original_perplexity_remains_and_the_report_says_why(parent, text_file, missing):
    log_file = parent / "calibration_log.json"
    if missing == "log":
        log_file.unlink()
    else:
        log = json.loads(log_file.read_text())
        log["options"]["model"] = "/nowhere/model"
        log_file.write_text(json.dumps(log))
    options = EvaluateOptions(parent, text_file, width=4, no_original=missing == "option", **MEASURE)
    report = run_evaluation(options)
    assert report.original is None
    assert (report.results[0].kl, report.results[0].top1_agreement, report.results[0].increase) == (None, None, None)
    expected = {"log": "names no original", "model": "the original, /nowhere/model, is not there", "option": None}[missing]
    assert report.notes == [] if expected is None else expected in report.notes[0]


def test_an_original_that_is_not_there_or_not_the_original_is_refused(parent, llama_dir, text_file, make_model):
    with pytest.raises(InputError, match="/nowhere is not a folder"):
        run_evaluation(EvaluateOptions(parent, text_file, original=Path("/nowhere"), **MEASURE))
    other = make_model(LlamaConfig(**SIZES | {"num_hidden_layers": 1}, tie_word_embeddings=True))
    with pytest.raises(InputError, match="its num_hidden_layers is 1, not 2"):
        run_evaluation(EvaluateOptions(parent, text_file, original=other, **MEASURE))


def test_tokenizers_that_differ_are_refused(parent, llama_dir, text_file):
    tokenizer = load_tokenizer(parent)
    tokenizer.add_tokens(["the"])
    tokenizer.save_pretrained(parent)
    with pytest.raises(InputError, match="different vocabularies"):
        run_evaluation(EvaluateOptions(parent, text_file, **MEASURE))
    text_file = parent / "text.txt"
    text_file.write_text("the end " * 100)
    with pytest.raises(InputError, match=r"makes token 256 .* but the model knows 256 tokens"):
        run_evaluation(EvaluateOptions(parent, text_file, no_original=True, **MEASURE))


def test_a_text_shorter_than_a_window_and_a_window_beyond_the_context_are_refused(parent, text_file, tmp_path):
    short = tmp_path / "short.txt"
    short.write_text("x" * 31)
    with pytest.raises(InputError, match="has 31 tokens; one window needs 32"):
        run_evaluation(EvaluateOptions(parent, short, seq_len=32))
    with pytest.raises(InputError, match="seq_len is 65, but the model's context is 64"):
        run_evaluation(EvaluateOptions(parent, text_file, seq_len=65))


def test_an_unknown_profile_is_refused_with_those_that_exist(parent, text_file):
    with pytest.raises(InputError, match=r"no profile 'mix-9'; it has 2, 3, 4, 6, 8, mix-3\.0"):
        run_evaluation(EvaluateOptions(parent, text_file, profile=("4", "mix-9"), **MEASURE))


def test_a_profile_whose_logits_are_no_numbers_is_named(parent, text_file, monkeypatch):
    real = subject.set_profile

    def set_profile(model, reader, profile):
        real(model, reader, profile)
        if profile.name == "3":
            model.get_parameter("model.layers.1.mlp.up_proj.weight").fill_(math.nan)

    monkeypatch.setattr(subject, "set_profile", set_profile)
    with pytest.raises(InputError, match="profile 3: the model's logits are NaN"):
        run_evaluation(EvaluateOptions(parent, text_file, **MEASURE))


def test_out_holds_json_markdown_and_a_plot(parent, text_file, tmp_path):
    out = tmp_path / "deep" / "report"
    report = run_evaluation(EvaluateOptions(parent, text_file, profile=("4", "mix-3.0"), out=out, **MEASURE))
    document = json.loads((out / "report.json").read_text())
    assert [result["kl"] for result in document["results"]] == [result.kl for result in report.results]
    assert "| mix-3.0 |" in (out / "report.md").read_text()
    assert (out / "quality.png").read_bytes().startswith(b"\x89PNG")


def test_without_matplotlib_out_is_refused_before_anything_is_measured(parent, text_file, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setattr(run_module, "measure_perplexity", None)
    with pytest.raises(UnsupportedError, match=r'pip install "matgptq-vllm\[plot\]"'):
        run_evaluation(EvaluateOptions(parent, text_file, out=tmp_path / "report", **MEASURE))


def test_the_card_takes_the_measured_quality_and_replaces_it_by_the_next(parent, text_file):
    def card(**changes: object) -> str:
        run_evaluation(EvaluateOptions(parent, text_file, update_card=True, **MEASURE | changes))
        return (parent / "README.md").read_text()

    first = card()
    # What a server shows of each precision.
    assert list(read_perplexities(parent)) == ["2", "3", "4", "6", "8", "mix-3.0"]
    assert str(parent.parent) not in (parent / QUALITY_FILE).read_text()
    assert "Not measured yet" not in first
    assert "| mix-3.0 |" in first
    second = card(width=4)
    assert "| mix-3.0 |" not in second
    assert second.count("## Quality") == 1
    assert second.endswith(first[first.index("## Calibration") :])


def test_the_card_of_a_plain_model_is_left_alone(llama_dir, text_file):
    with pytest.raises(InputError, match="is not a parent; --update-card"):
        run_evaluation(EvaluateOptions(llama_dir, text_file, update_card=True, **MEASURE))


def test_a_plain_model_is_compared_where_an_original_is_given(llama_dir, text_file):
    report = run_evaluation(EvaluateOptions(llama_dir, text_file, original=llama_dir, **MEASURE))
    assert report.results[0].top1_agreement == 1
