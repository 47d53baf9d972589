import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from calibrate.fingerprint import fingerprint
from calibrate.group_rounding import RoundedLayer
from calibrate.journal import Journal, run_directory
from calibrate.pipeline import RoundedBlock
from matgptq_vllm.core.errors import FormatError, InputError

FACTS = {"model file config.json": "00", "text": "11", "option seed": "0"}
CPU = torch.device("cpu")

HOLD = """
import sys
from pathlib import Path
from calibrate.run_lock import RunLock
RunLock(Path(sys.argv[1]), Path("out"))
print("held", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def block() -> RoundedBlock:
    codes = torch.arange(60, dtype=torch.uint8).view(10, 6)
    scales = torch.rand(10, 1).bfloat16()
    # Layers that were rounded together share memory.
    layers = [
        RoundedLayer("h.3.q_proj", codes[:7], scales[:7], {2: 0.5, 8: 1e-7}, 77),
        RoundedLayer("h.3.a_proj", codes[7:], scales[7:], {}, 77),
    ]
    return RoundedBlock("h.3", layers, 1.5, 12345)


def test_a_block_comes_back_as_it_was_in_the_next_run(block, tmp_path):
    out = tmp_path / "parent"
    with Journal(out, FACTS) as journal:
        assert journal.read(3) is None
        journal.write(3, block)
    with Journal(out, FACTS) as journal:
        again = journal.read(3)
        assert journal.read(4) is None
    assert (again.name, again.seconds, again.peak_bytes) == ("h.3", 1.5, 12345)
    assert [layer.name for layer in again.layers] == ["h.3.q_proj", "h.3.a_proj"]
    for layer, other in zip(again.layers, block.layers, strict=True):
        assert torch.equal(layer.codes, other.codes)
        assert torch.equal(layer.scales, other.scales)
        assert (layer.errors, layer.num_tokens) == (other.errors, 77)
    assert list(tmp_path.iterdir()) == [run_directory(out)]


def test_a_discarded_run_leaves_nothing(block, tmp_path):
    with Journal(tmp_path / "parent", FACTS) as journal:
        journal.write(0, block)
        journal.discard()
    assert list(tmp_path.iterdir()) == []


def test_changed_inputs_are_refused_by_name_and_nothing_is_lost(block, tmp_path):
    out = tmp_path / "parent"
    with Journal(out, FACTS) as journal:
        journal.write(0, block)
    changed = FACTS | {"text": "22", "option seed": "1", "model file tokenizer.json": "33"}
    with pytest.raises(InputError, match=r"model file tokenizer\.json; option seed \(was 0, is 1\); text\. .*--restart"):
        Journal(out, changed)
    with Journal(out, FACTS) as journal:
        assert journal.read(0) is not None


def test_restart_discards_the_unfinished_run(block, tmp_path):
    out = tmp_path / "parent"
    with Journal(out, FACTS) as journal:
        journal.write(0, block)
    with Journal(out, FACTS | {"text": "22"}, restart=True) as journal:
        assert journal.read(0) is None


def test_blocks_without_a_journal_are_not_trusted(block, tmp_path):
    out = tmp_path / "parent"
    with Journal(out, FACTS) as journal:
        journal.write(0, block)
    (run_directory(out) / "journal.json").unlink()
    with Journal(out, FACTS) as journal:
        assert journal.read(0) is None


def test_damaged_files_are_errors_that_name_the_way_out(block, tmp_path):
    out = tmp_path / "parent"
    with Journal(out, FACTS) as journal:
        journal.write(0, block)
        path = run_directory(out) / "block-00000.safetensors"
        path.write_bytes(path.read_bytes()[:-10])
        with pytest.raises(FormatError, match=r"block-00000\.safetensors: damaged .*--restart"):
            journal.read(0)
    (run_directory(out) / "journal.json").write_text("[1]")
    with pytest.raises(FormatError, match=r"journal\.json: no journal of a run; --restart"):
        Journal(out, FACTS)


def test_two_runs_to_one_folder_refuse_and_the_end_of_a_process_frees_the_lock(tmp_path):
    out = tmp_path / "parent"
    command = [sys.executable, "-c", HOLD, str(run_directory(out))]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        assert holder.stdout.readline() == b"held\n"
        with pytest.raises(InputError, match=rf"another run \(process {holder.pid}\) is writing .*parent; wait until it ends"):
            Journal(out, FACTS)
        holder.kill()
    with Journal(out, FACTS), pytest.raises(InputError, match=f"process {os.getpid()}"):
        Journal(out, FACTS, restart=True)


def test_a_fingerprint_changes_with_every_input_and_not_with_the_output(tiny_options, tmp_path):
    options = tiny_options()
    files = ["model.safetensors"]
    before = fingerprint(options, files, CPU, 1)
    assert before == fingerprint(replace(options, out=tmp_path / "b", overwrite=True, restart=True), files, CPU, 1)
    assert {"model file config.json", "model file model.safetensors", "model file tokenizer.json", "text"} <= before.keys()

    def changed(**changes: object) -> set[str]:
        after = fingerprint(replace(options, **changes), files, CPU, 1)
        return {name for name in before if before[name] != after[name]}

    assert changed(damp=0.5) == {"option damp"}
    assert changed(widths={3: 1.0}) == {"option widths"}
    other = tmp_path / "other.txt"
    other.write_text("other")
    assert changed(text=other) == {"text"}
    assert fingerprint(options, files, CPU, 2)["number of processes"] == "2"


def test_a_text_of_the_same_content_elsewhere_is_the_same(tiny_options, tmp_path):
    options = tiny_options()
    copy = tmp_path / "copy.txt"
    copy.write_bytes(Path(options.text).read_bytes())
    files = ["model.safetensors"]
    assert fingerprint(options, files, CPU, 1) == fingerprint(replace(options, text=copy), files, CPU, 1)
