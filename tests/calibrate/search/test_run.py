"""Whole searches of a tiny parent."""

import json
import pickle
import shutil
import signal
import subprocess
import sys
from dataclasses import fields, replace
from fractions import Fraction
from pathlib import Path

import pytest
import torch

from calibrate.data import encode_text, load_tokenizer
from calibrate.evaluate.divergence import Divergence
from calibrate.evaluate.original import Original
from calibrate.evaluate.perplexity import measure_perplexity
from calibrate.evaluate.sliced_model import load_sliced_model
from calibrate.model import load_model
from calibrate.search import store
from calibrate.search.fitness import DivergenceFromOriginal, Targets
from calibrate.search.inputs import read_windows
from calibrate.search.journal import JOURNAL_FILE, Journal
from calibrate.search.report import as_json_values, as_table, line_between
from calibrate.search.run import plan, prepare, run_search
from calibrate.search.store import SEARCH_LOG_FILE
from calibrate.search.units import find_units
from calibrate.search.weights import DeviceParent, SwitchedModel
from matgptq_vllm.core.checkpoint import ParentReader
from matgptq_vllm.core.errors import InputError
from matgptq_vllm.core.profile import PROFILES_FILE
from matgptq_vllm.core.summary import ParentSummary

SEARCH = """
import os, pickle, signal, sys
from calibrate.search import journal, run
add, calls = journal.Journal.add, []
def killing(self, *arguments):
    calls.append(1)
    if len(calls) == 9:
        os.kill(os.getpid(), signal.SIGKILL)
    add(self, *arguments)
journal.Journal.add = killing
run.run_search(pickle.loads(bytes.fromhex(sys.argv[1])))
"""


class Killed(BaseException):
    """Ends a search where a signal would have: nothing handles it."""


@pytest.fixture
def killed(monkeypatch):
    """Function that runs a search and kills it when it calls a function for the given time."""

    def run(options, owner, name: str, time: int = 1) -> None:
        original, calls = getattr(owner, name), []

        def killing(*arguments):
            calls.append(1)
            if len(calls) == time:
                raise Killed
            return original(*arguments)

        with monkeypatch.context() as patch:
            patch.setattr(owner, name, killing)
            with pytest.raises(Killed):
                run_search(options)
        assert (options.model / JOURNAL_FILE).exists()

    return run


def copied(options, tmp_path: Path, name: str):
    """The same options for a copy of the parent."""
    return replace(options, model=Path(shutil.copytree(options.model, tmp_path / name)))


def test_a_search_adds_a_profile_within_its_budget_that_serving_reads(search_options):
    options = search_options()
    before = {path.name for path in options.model.iterdir()}
    report = run_search(options)
    parent = ParentSummary(options.model)
    (profile,) = parent.stored_profiles()
    assert profile.name == "mix-3.0"
    assert profile.average_bits(parent.num_weights) <= 3.0
    assert report.widths == {"mix-3.0": dict(profile.widths)}
    assert "mix-3.0" in [served.name for served in parent.profiles(max_width=8)]
    assert {path.name for path in options.model.iterdir()} == before | {SEARCH_LOG_FILE}
    kept = json.loads((options.model / SEARCH_LOG_FILE).read_text())["mix-3.0"]
    assert kept["budget"] == "3.0 bits per weight"
    assert kept["search_kl"] == next(row.search_kl for row in report.rows if row.name == "mix-3.0")


def test_the_result_is_no_worse_than_uniform_on_the_search_text(search_options):
    report = run_search(search_options(budget="2.5,3.0,4.0"))
    rows = {row.name: row for row in report.rows}
    assert rows["mix-3.0"].search_kl <= rows["3"].search_kl
    assert rows["mix-4.0"].search_kl <= rows["4"].search_kl
    assert rows["mix-2.5"].search_kl < rows["2"].search_kl
    assert list(rows) == sorted(rows, key=lambda name: rows[name].bits_per_weight)


def test_the_measured_numbers_are_those_of_evaluation(search_options):
    options = search_options(budget="3.4")
    report = run_search(options)
    row = next(row for row in report.rows if row.name == "mix-3.4")
    job = prepare(replace(options, name="other"))
    original = load_model(job.original, torch.float32)
    sliced = load_sliced_model(options.model, "mix-3.4")
    for windows, wanted in ((job.text.windows, row.search_kl), (job.text.held_out, row.held_out.kl)):
        reference = Original(load_model(job.original, torch.float32), windows)
        divergence = Divergence(reference, "test")
        measured = measure_perplexity(sliced, windows, "test", divergence.observe)
        assert wanted == pytest.approx(divergence.kl, rel=1e-3)
    assert row.held_out.perplexity == pytest.approx(measured.perplexity, rel=1e-6)
    assert report.original_perplexity == pytest.approx(
        measure_perplexity(original, job.text.held_out, "test").perplexity, rel=1e-6
    )


def test_a_switched_model_is_the_sliced_model_however_it_came_there(search_options):
    directory = search_options().model
    reader = DeviceParent(directory, torch.device("cpu"))
    units = find_units(reader.layers)
    batch = torch.arange(32)[None] + 97
    for kept_bytes in (0, 10_000, 1 << 30):
        model = SwitchedModel(reader, units, (2,) * len(units), torch.float32, torch.device("cpu"), kept_bytes)
        for widths in ((3,) * len(units), (8, 2, 4, 6) * 2, (2,) * len(units), (8, 2, 4, 6) * 2, (4,) * len(units)):
            logits = model.switch(widths)(batch).logits
        assert torch.equal(logits, load_sliced_model(directory, "4")(batch).logits)


def test_memory_bounds_change_no_measurement(search_options):
    options = search_options()
    job = prepare(options)
    measured = []
    for kept_bytes in (0, 50_000, 1 << 30):
        targets = Targets(Original(load_model(job.original, torch.float32), job.text.windows), 12, kept_bytes)
        model = SwitchedModel(job.reader, job.units, (2,) * 8, torch.float32, job.device, kept_bytes)
        measure = DivergenceFromOriginal(model, targets, job.text.windows)
        measured.append([measure(genome, range(12)) for genome in ((3,) * 8, (2, 8) * 4)])
    assert measured[0] == measured[1] == measured[2]


def test_the_held_out_text_is_the_end_and_is_never_searched_on(search_options):
    options = search_options(num_samples=200)
    job = prepare(options)
    letters = encode_text(options.text, load_tokenizer(job.original), 256)
    text = read_windows(options, load_model(job.original).config)
    assert torch.equal(text.windows.flatten().sort().values, letters[:3200].sort().values)
    end = {tuple(window.tolist()) for window in letters[3200:].split(32)}
    assert {tuple(window.tolist()) for window in text.held_out} <= end


def test_no_held_out_text_is_a_choice(search_options):
    report = run_search(search_options(held_out=0.0))
    assert report.original_perplexity is None
    assert all(row.held_out is None for row in report.rows)
    assert "held out" not in as_table(report)


@pytest.mark.parametrize(("budget", "changes"), [("15000B", {}), ("14KiB", {}), ("14us", {"bandwidth": Fraction(10**9)})])
def test_bytes_and_time_are_budgets_too(search_options, budget, changes):
    options = search_options(budget=budget, **changes)
    report = run_search(options)
    (row,) = [row for row in report.rows if row.cost is not None]
    limit = options.budget[0].amount / (1000 if changes else 1)
    assert 0.9 * limit < row.weight_bytes <= limit


def test_a_name_that_is_taken_is_refused_before_any_work_unless_overwritten(search_options):
    run_search(search_options())
    with pytest.raises(InputError, match=r"a profile 'mix-3\.0' already; choose another --name, or pass --overwrite"):
        run_search(search_options())
    with pytest.raises(InputError, match="already"):
        plan(search_options())
    run_search(search_options(budget="4.0"))
    report = run_search(search_options(overwrite=True, seed=1))
    stored = ParentSummary(search_options().model).stored_profiles()
    assert [profile.name for profile in stored] == ["mix-3.0", "mix-4.0"]
    assert dict(stored[0].widths) == report.widths["mix-3.0"]


def test_the_same_command_finds_the_same_profile(search_options, tmp_path):
    options = search_options(budget="3.3")
    again = copied(options, tmp_path, "again")
    first, second = run_search(options), run_search(again)
    assert replace(first, model="") == replace(second, model="")


def test_a_killed_search_goes_on_to_the_identical_result(search_options, killed, tmp_path):
    options = search_options(budget="2.6,3.3")
    reference = run_search(copied(options, tmp_path, "reference"))
    for time in (2, 3, 30):
        killed(options, Journal, "add", time)
        with (options.model / JOURNAL_FILE).open("a") as file:
            file.write('{"widths": [2, 3')
    killed(options, store, "write_profiles")
    assert ParentSummary(options.model).stored_profiles() == []
    killed(options, Journal, "remove")
    assert len(ParentSummary(options.model).stored_profiles()) == 2
    report = run_search(options)
    assert replace(report, model="") == replace(reference, model="")
    assert not (options.model / JOURNAL_FILE).exists()
    stored = [path.read_text() for path in (options.model / PROFILES_FILE, tmp_path / "reference" / PROFILES_FILE)]
    assert stored[0] == stored[1]


def test_a_signal_that_cannot_be_handled_loses_nothing_either(search_options, tmp_path):
    options = search_options()
    reference = run_search(copied(options, tmp_path, "reference"))
    code = [sys.executable, "-c", SEARCH, pickle.dumps(options).hex()]
    assert subprocess.run(code, capture_output=True, check=False).returncode == -signal.SIGKILL
    assert len((options.model / JOURNAL_FILE).read_text().splitlines()) == 1 + 8
    assert replace(run_search(options), model="") == replace(reference, model="")


def test_a_killed_search_of_other_inputs_is_not_continued(search_options, killed, tmp_path):
    options = search_options()
    killed(options, Journal, "add", 9)
    text = tmp_path / "other.txt"
    text.write_text(options.text.read_text()[::-1])
    with pytest.raises(InputError, match=r"--text was .* windows of text was .* --restart"):
        run_search(replace(options, text=text))
    with pytest.raises(InputError, match="--seed was 0, is 5"):
        run_search(replace(options, seed=5))
    other = Path(shutil.copytree(options.model, tmp_path / "other-parent"))
    shutil.copy(options.model / JOURNAL_FILE, other)
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 1e-3}))
    with pytest.raises(InputError, match="parent was"):
        run_search(replace(options, model=other))
    run_search(replace(options, text=text, restart=True))
    assert not (options.model / JOURNAL_FILE).exists()


def test_more_generations_go_on_from_what_was_measured(search_options, killed, tmp_path):
    options = search_options()
    killed(options, store, "write_profiles")
    longer = replace(options, generations=4)
    fresh = copied(longer, tmp_path, "fresh")
    (fresh.model / JOURNAL_FILE).unlink()
    assert run_search(longer).widths == run_search(fresh).widths


def test_the_plan_says_what_would_be_done_and_writes_nothing(search_options):
    options = search_options(budget="2.5,3.0")
    before = {path: path.stat().st_mtime_ns for path in options.model.rglob("*")}
    text = plan(options)
    assert "would search mix-2.5" in text
    assert "8 units (14 layers) within 3.0 bits per weight" in text
    assert "float32 on cpu" in text
    assert {path: path.stat().st_mtime_ns for path in options.model.rglob("*")} == before


def test_the_original_must_be_there_and_be_the_right_one(search_options, llama_dir, make_model, tmp_path):
    options = search_options()
    log = options.model / "calibration_log.json"
    document = json.loads(log.read_text())
    document["options"]["model"] = str(tmp_path / "gone")
    log.write_text(json.dumps(document))
    with pytest.raises(InputError, match=r"gone, from which .* is not there; pass --original MODEL"):
        run_search(options)
    log.unlink()
    with pytest.raises(InputError, match="does not say what it was calibrated from; pass --original MODEL"):
        run_search(options)
    with pytest.raises(InputError, match="not a folder"):
        run_search(replace(options, original=tmp_path / "gone"))
    config = load_model(llama_dir).config
    narrow = make_model(type(config)(**{**config.to_dict(), "intermediate_size": 80}))
    with pytest.raises(InputError, match=r"mlp\.gate_proj is \(80, 40\), the parent's \(72, 40\)"):
        run_search(replace(options, original=narrow))
    deep = make_model(type(config)(**{**config.to_dict(), "num_hidden_layers": 3, "layer_types": None}))
    with pytest.raises(InputError, match="num_hidden_layers is 3, not 2"):
        run_search(replace(options, original=deep))
    model = load_model(llama_dir)
    model.model.norm.weight.data *= 100
    model.save_pretrained(tmp_path / "other")
    with pytest.raises(InputError, match="nats per token: it was not made from that model"):
        run_search(replace(options, original=tmp_path / "other"))
    run_search(replace(options, original=llama_dir))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_samples": 1000}, "windows of 16 need 16000"),
        ({"seq_len": 65}, "context is 64 tokens"),
        ({"held_out": 0.005}, "the held-out part .* has 20 tokens; one window needs 32"),
        ({"budget": "1.5"}, "no profile meets a budget of 1.5 bits per weight: the smallest possible is 2.0000"),
        ({"budget": "8.0"}, "serve the uniform profile 8"),
    ],
)
def test_what_cannot_be_searched_is_refused_and_nothing_is_left(search_options, changes, message):
    options = search_options(**changes)
    before = set(options.model.iterdir())
    with pytest.raises(InputError, match=message):
        run_search(options)
    assert set(options.model.iterdir()) == before


def test_the_report_is_a_table_and_json(search_options):
    report = run_search(search_options(budget="2.5"))
    table = as_table(report)
    assert len([line for line in table.splitlines() if line.startswith("|")]) == 5
    assert "against the line from 2 to 3" in table
    values = json.loads(json.dumps(as_json_values(report)))
    assert values.keys() == {field.name for field in fields(report)}
    row = next(row for row in report.rows if row.name == "mix-2.5")
    line = line_between(row, report.rows)
    by_name = {row.name: row for row in report.rows}
    share = row.bits_per_weight - 2
    assert line.search_kl == pytest.approx((1 - share) * by_name["2"].search_kl + share * by_name["3"].search_kl)


def test_a_uniform_budget_is_compared_with_the_uniform_profile(search_options):
    options = search_options()
    report = run_search(options)
    row = next(row for row in report.rows if row.name == "mix-3.0")
    if row.bits_per_weight == 3.0:
        assert line_between(row, report.rows).name == "3"
    assert set(ParentReader(options.model).layers) == set(report.widths["mix-3.0"])
