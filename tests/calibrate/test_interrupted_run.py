"""A calibration that is killed or runs out of disk leaves nothing that is taken for a parent, and can be taken up."""

import json
import shutil
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from calibrate import pipeline
from calibrate.journal import run_directory
from calibrate.options import CalibrateOptions
from calibrate.run import run_calibration
from matgptq_vllm.core.checkpoint import ParentReader
from matgptq_vllm.core.errors import FormatError, InputError
from matgptq_vllm.core.folder_swap import partial_directory

CALIBRATE = """
import resource, sys
from calibrate.run import run_calibration
if max_file_bytes is not None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (max_file_bytes, max_file_bytes))
try:
    run_calibration(options)
except OSError as error:
    sys.exit(FULL_DISK)
"""

FULL_DISK = 28
"""Exit status of a calibration that ended by an OSError."""

KILL = """
import os, signal
def kill():
    os.kill(os.getpid(), signal.SIGKILL)
"""

KILL_IN_SECOND_BLOCK = (
    KILL
    + """
from calibrate import group_rounding
round_layers = group_rounding.round_layers
def killing(weight, statistics, settings, name):
    if name == "model.layers.1.mlp.gate_proj":
        kill()
    return round_layers(weight, statistics, settings, name)
group_rounding.round_layers = killing
"""
)

KILL_BEFORE_A_BLOCK_HAS_ITS_NAME = (
    KILL
    + """
from pathlib import Path
replace = Path.replace
def killing(self, target):
    if target.name == "block-00001.safetensors":
        kill()
    return replace(self, target)
Path.replace = killing
"""
)

KILL_IN_THE_PARENT = (
    KILL
    + """
from matgptq_vllm.core.checkpoint_writer import ParentWriter
add_layer = ParentWriter.add_layer
def killing(self, name, codes, scales):
    if name == "model.layers.1.self_attn.k_proj":
        kill()
    add_layer(self, name, codes, scales)
ParentWriter.add_layer = killing
"""
)

KILL_BETWEEN_RENAMES = (
    KILL
    + """
from pathlib import Path
rename = Path.rename
def killing(self, target):
    rename(self, target)
    if Path(target).name == ".parent.replaced":
        kill()
Path.rename = killing
"""
)

FAILING_BYTES = 20_000
"""Less than the file of unquantized weights and a block, more than the tokenizer: the disk is full in the middle."""


@pytest.fixture(scope="module")
def calibrate(start_apart) -> Callable[..., int]:
    """Function that runs a calibration in another process, after the statements ``before``; returns its exit status."""

    def run(options: CalibrateOptions, before: str = "", max_file_bytes: int | None = None) -> int:
        process = start_apart(before + CALIBRATE, options=options, max_file_bytes=max_file_bytes, FULL_DISK=FULL_DISK)
        process.join(timeout=300)
        return process.exitcode

    return run


def contents(directory: Path) -> dict[str, bytes]:
    """Every file below a folder; of the log what does not differ from run to run."""
    files = {path.relative_to(directory).as_posix(): path.read_bytes() for path in directory.rglob("*") if path.is_file()}
    log = json.loads(files["calibration_log.json"])
    del log["run"]
    return files | {"calibration_log.json": json.dumps(log).encode()}


@pytest.fixture(scope="module")
def killed_in_second_block(llama_dir, text_file, tmp_path_factory, calibrate) -> Path:
    """The folder of a run of ``tiny_options`` that was killed in its second block."""
    out = tmp_path_factory.mktemp("killed") / "parent"
    sizes = {"num_samples": 12, "seq_len": 32, "group_size": 32, "streams": (3,), "sweeps": 0}
    assert calibrate(CalibrateOptions(llama_dir, out, text_file, **sizes), KILL_IN_SECOND_BLOCK) == -signal.SIGKILL
    return run_directory(out)


@pytest.fixture
def expected(tiny_options, tmp_path) -> dict[str, bytes]:
    """What a run that nobody disturbs writes."""
    return contents(run_calibration(tiny_options(out=tmp_path / "undisturbed" / "parent")))


@pytest.mark.parametrize(
    ("kill", "num_blocks"), [(KILL_BEFORE_A_BLOCK_HAS_ITS_NAME, 1), (KILL_IN_THE_PARENT, 2)], ids=["block", "parent"]
)
def test_a_killed_run_leaves_no_parent_and_is_taken_up_to_the_same_bytes(kill, num_blocks, tiny_options, expected, calibrate):
    options = tiny_options()
    assert calibrate(options, kill) == -signal.SIGKILL
    assert not options.out.exists()
    assert len(list(run_directory(options.out).glob("block-*.safetensors"))) == num_blocks
    for left in (run_directory(options.out), partial_directory(options.out)):
        if left.exists():
            with pytest.raises(FormatError, match=r"not a parent|never finished"):
                ParentReader(left)
    assert contents(run_calibration(options)) == expected
    assert set(options.out.parent.iterdir()) == {options.out, options.out.parent / "undisturbed"}


def test_a_run_is_taken_up_in_the_block_that_it_was_in(killed_in_second_block, tiny_options, expected, monkeypatch):
    options = tiny_options()
    shutil.copytree(killed_in_second_block, run_directory(options.out))
    rounded = []
    round_block = pipeline._round_block

    def noting(resident, *arguments):
        rounded.append(resident.block.name)
        return round_block(resident, *arguments)

    monkeypatch.setattr(pipeline, "_round_block", noting)
    assert contents(run_calibration(options)) == expected
    assert rounded == ["model.layers.1"]
    assert not run_directory(options.out).exists()


def test_an_unfinished_run_with_other_inputs_is_refused_until_it_is_discarded(killed_in_second_block, tiny_options):
    options = tiny_options(seed=1)
    shutil.copytree(killed_in_second_block, run_directory(options.out))
    with pytest.raises(InputError, match=r"had other inputs: option seed \(was 0, is 1\)\. .*--restart"):
        run_calibration(options)
    assert (run_directory(options.out) / "block-00000.safetensors").exists()
    assert run_calibration(replace(options, restart=True)) == options.out
    assert list(options.out.parent.iterdir()) == [options.out]


def test_an_old_parent_survives_a_kill_between_the_renames_that_replace_it(tiny_options, expected, calibrate):
    options = tiny_options(overwrite=True)
    before = contents(run_calibration(tiny_options(seed=1)))
    assert calibrate(options, KILL_BETWEEN_RENAMES) == -signal.SIGKILL
    replaced = options.out.with_name(".parent.replaced")
    assert contents(replaced) == before
    assert contents(run_calibration(options)) == expected
    assert set(options.out.parent.iterdir()) == {options.out, options.out.parent / "undisturbed"}


def test_a_full_disk_is_an_error_after_which_the_run_can_be_taken_up(tiny_options, calibrate):
    options = tiny_options()
    assert calibrate(options, max_file_bytes=FAILING_BYTES) == FULL_DISK
    assert list(options.out.parent.iterdir()) == [run_directory(options.out)]
    assert run_calibration(options) == options.out
    assert list(options.out.parent.iterdir()) == [options.out]


def test_a_full_disk_leaves_the_old_parent_as_it_was(tiny_options, calibrate):
    directory = run_calibration(tiny_options(method="rtn"))
    before = contents(directory)
    assert calibrate(tiny_options(overwrite=True), max_file_bytes=FAILING_BYTES) == FULL_DISK
    assert contents(directory) == before
    assert set(directory.parent.iterdir()) == {directory, run_directory(directory)}
