"""Fixtures that several kinds of test share: the example model and one parent calibrated from it."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from calibrate.options import CalibrateOptions
from calibrate.run import run_calibration
from matgptq_vllm.core.checkpoint import ParentReader
from matgptq_vllm.core.checkpoint_writer import write_profiles
from matgptq_vllm.core.profile import Profile

ROOT = Path(__file__).resolve().parent.parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """End-to-end tests, which take longest, come first, so that no process is left with one when the others have ended."""
    items.sort(key=lambda item: "e2e" not in item.path.parts)


@pytest.fixture(scope="session")
def wide_vectors() -> bool:
    """Whether what vLLM's CPU build has for processors with AVX-512 only, and its GPU build always, runs here."""
    return torch.cuda.is_available() or torch.backends.cpu.get_cpu_capability() == "AVX512"


@pytest.fixture(scope="session")
def run_kernels() -> Callable[..., None]:
    """``run_kernels(code, *arguments)``: Python code, or a script, that calls Triton kernels, in a process of its own: compiled
    where there is a GPU, elsewhere in Triton's interpreter, about which Triton decides at import."""

    def run(code: str | Path, *arguments: object) -> None:
        found = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(found)}
        if not torch.cuda.is_available():
            interpreter = Path(sys.prefix) / "triton-interpreter"
            environment |= {"TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join([str(ROOT), str(interpreter), *found[1:]])}
        program = [str(code)] if isinstance(code, Path) else ["-c", code]
        command = [sys.executable, *program, *map(str, arguments)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=500, check=False)
        assert done.returncode == 0, done.stderr

    return run


@pytest.fixture(scope="session")
def example_model() -> Path:
    """The 7M model that ships with the project."""
    return ROOT / "examples" / "model"


@pytest.fixture(scope="session")
def calibration_text() -> Path:
    return ROOT / "examples" / "text" / "calibration.txt"


@pytest.fixture(scope="session")
def evaluation_text() -> Path:
    return ROOT / "examples" / "text" / "evaluation.txt"


@pytest.fixture(scope="session")
def parent_dir(tmp_path_factory: pytest.TempPathFactory, example_model: Path, calibration_text: Path) -> Path:
    """The example model, calibrated; without stored profiles. Read only."""
    out = tmp_path_factory.mktemp("parent") / "gutenberg-7m"
    return run_calibration(CalibrateOptions(model=example_model, out=out, text=calibration_text, num_samples=64))


@pytest.fixture(scope="session")
def profiled_parent(tmp_path_factory: pytest.TempPathFactory, parent_dir: Path) -> Path:
    """The same parent with two heterogeneous profiles, which put every width next to every other. Read only."""
    directory = tmp_path_factory.mktemp("profiled") / "gutenberg-7m"
    shutil.copytree(parent_dir, directory)
    layers = list(ParentReader(directory).layers)
    by_kind = {"self_attn": 6, "mlp": 3}
    by_depth = (8, 4, 2, 3, 6, 8)
    write_profiles(
        directory,
        [
            Profile("mix-kind", {name: by_kind[name.split(".")[3]] for name in layers}),
            Profile("mix-depth", {name: by_depth[int(name.split(".")[2])] for name in layers}),
        ],
    )
    return directory
