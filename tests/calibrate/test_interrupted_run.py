"""A calibration that is killed or runs out of disk never leaves something that is taken for a parent."""

import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from calibrate.run import run_calibration
from matgptq_vllm.core.checkpoint import ParentReader
from matgptq_vllm.core.errors import FormatError

CALIBRATE = """
import sys
from pathlib import Path
from calibrate.options import CalibrateOptions
from calibrate.run import run_calibration
model, text, out = map(Path, sys.argv[1:4])
run_calibration(CalibrateOptions(model, out, text, num_samples=12, seq_len=32, group_size=32, overwrite=True))
"""

KILL_AT_LAYER = """
import os, signal
from matgptq_vllm.core.checkpoint_writer import ParentWriter
add_layer = ParentWriter.add_layer
def killing(self, name, codes, scales):
    if name == "model.layers.1.self_attn.k_proj":
        os.kill(os.getpid(), signal.SIGKILL)
    add_layer(self, name, codes, scales)
ParentWriter.add_layer = killing
"""

KILL_AT_SECOND_FILE = """
import os, signal
import safetensors.torch
save_file = safetensors.torch.save_file
calls = []
def killing(tensors, path, metadata):
    save_file(tensors, path, metadata)
    calls.append(path)
    if len(calls) == 2:
        os.kill(os.getpid(), signal.SIGKILL)
safetensors.torch.save_file = killing
"""

FAILING_BYTES = 20_000
"""Less than the file of unquantized weights, more than the tokenizer: the disk is full in the middle of the parent."""


def calibrate(options, before: str = "", max_file_bytes: int | None = None) -> subprocess.CompletedProcess:
    """Run a calibration in another process, after the statements ``before``."""

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (max_file_bytes, max_file_bytes))

    arguments = [options.model, options.text, options.out]
    return subprocess.run(
        [sys.executable, "-c", before + CALIBRATE, *map(str, arguments)],
        preexec_fn=limit if max_file_bytes is not None else None,
        capture_output=True,
        text=True,
        check=False,
    )


def contents(directory: Path) -> dict[str, bytes]:
    return {path.relative_to(directory).as_posix(): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


@pytest.mark.parametrize("kill", [KILL_AT_LAYER, KILL_AT_SECOND_FILE])
def test_a_killed_run_leaves_no_parent_and_the_next_one_cleans_up(kill, tiny_options):
    options = tiny_options()
    assert calibrate(options, kill).returncode == -signal.SIGKILL
    assert not options.out.exists()
    (left,) = options.out.parent.iterdir()
    with pytest.raises(FormatError, match="never finished"):
        ParentReader(left)
    assert run_calibration(options) == options.out
    assert list(options.out.parent.iterdir()) == [options.out]


def test_a_killed_run_leaves_the_old_parent_as_it_was(tiny_options):
    directory = run_calibration(tiny_options(seed=1))
    before = contents(directory)
    assert calibrate(tiny_options(), KILL_AT_SECOND_FILE).returncode == -signal.SIGKILL
    assert contents(directory) == before


def test_a_full_disk_is_an_error_that_leaves_nothing(tiny_options):
    options = tiny_options()
    finished = calibrate(options, max_file_bytes=FAILING_BYTES)
    assert finished.returncode == 1
    assert "OSError" in finished.stderr
    assert list(options.out.parent.iterdir()) == []


def test_a_full_disk_leaves_the_old_parent_as_it_was(tiny_options):
    directory = run_calibration(tiny_options(seed=1))
    before = contents(directory)
    assert calibrate(tiny_options(), max_file_bytes=FAILING_BYTES).returncode == 1
    assert contents(directory) == before
    assert list(directory.parent.iterdir()) == [directory]
