"""matgptq fetch: from a folder, and from a repository that a local server plays with the Hugging Face hub's protocol."""

import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from fnmatch import fnmatch
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from calibrate.fetch import SMALL_FILES, fetch
from calibrate.options import FetchOptions
from calibrate.run import run_calibration
from matgptq_vllm.core.checkpoint import METADATA_FILES, ParentReader
from matgptq_vllm.core.errors import FormatError, InputError

ROOT = Path(__file__).resolve().parents[2]
COMMIT = "0123456789abcdef0123456789abcdef01234567"
REPOSITORY = "acme/parent"


@pytest.fixture(scope="module")
def parent(llama_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small parent. Read only."""
    from calibrate.options import CalibrateOptions

    out = tmp_path_factory.mktemp("fetch") / "parent"
    return run_calibration(CalibrateOptions(model=llama_dir, out=out, method="rtn", group_size=32))


def files(directory: Path) -> set[str]:
    return {str(path.relative_to(directory)) for path in directory.rglob("*") if path.is_file()}


@pytest.mark.parametrize("width", [2, 4, 8])
def test_the_copy_is_a_parent_of_that_width(parent: Path, tmp_path: Path, width: int) -> None:
    out, ours, left_out = fetch(FetchOptions(parent, tmp_path / "copy", width))
    whole = ParentReader(parent)
    weights = {name for name in files(out) if name.endswith(".safetensors")}
    assert weights == set(whole.files(width))
    assert files(parent) - files(out) == set(whole.files()) - weights
    read = dict(ParentReader(out).tensors(width))
    assert read.keys() == dict(whole.tensors(width)).keys()
    assert ours == sum((parent / name).stat().st_size for name in weights)
    num_weights = sum(n * k for n, k in whole.layers.values())
    assert left_out == num_weights * (8 - width) // 8
    assert not list(tmp_path.glob(".*"))  # nothing half done is left


def test_a_copy_that_is_there_is_kept_and_one_of_less_is_replaced(parent: Path, tmp_path: Path) -> None:
    out = fetch(FetchOptions(parent, tmp_path / "copy", 3))[0]
    before = (out / "config.json").stat().st_ino
    fetch(FetchOptions(parent, out, 2))
    assert (out / "config.json").stat().st_ino == before
    fetch(FetchOptions(parent, out, 6))
    assert ParentReader(out).files(6) == ParentReader(parent).files(6)
    assert all((out / name).is_file() for name in ParentReader(parent).files(6))


def test_what_is_no_parent_or_would_be_lost_is_refused(parent: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    for options, error, told in (
        (FetchOptions(parent, other), InputError, "is no parent"),
        (FetchOptions(parent, parent), InputError, "is the parent itself"),
        (FetchOptions(tmp_path / "none", tmp_path / "copy"), InputError, "neither the folder"),
        (FetchOptions(other, tmp_path / "copy"), FormatError, "has no"),
    ):
        with pytest.raises(error, match=told):
            fetch(options)
    with pytest.raises(InputError, match="2, 3, 4, 6, 8"):
        FetchOptions(parent, other, 5)


def test_a_damaged_parent_never_gets_its_name(parent: Path, tmp_path: Path) -> None:
    damaged = fetch(FetchOptions(parent, tmp_path / "damaged"))[0]
    plane = next((damaged / "planes").glob("plane0*"))
    content = bytearray(plane.read_bytes())
    content[-1] ^= 1
    plane.write_bytes(content)
    with pytest.raises(FormatError, match="plane0"):
        fetch(FetchOptions(damaged, tmp_path / "copy"))
    assert not (tmp_path / "copy").exists()


def test_every_small_file_of_a_parent_is_brought() -> None:
    assert all(any(fnmatch(name, pattern) for pattern in SMALL_FILES) for name in METADATA_FILES)


@pytest.fixture
def hub(parent: Path) -> Iterator[tuple[str, list[str]]]:
    """Address of a hub with one repository, and the files that were downloaded from it."""
    downloaded: list[str] = []

    class Hub(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.do_GET()

        def do_GET(self) -> None:
            path = self.path.partition("?")[0]
            if path.startswith(f"/api/models/{REPOSITORY}/revision/"):
                self.answer(json.dumps({"id": REPOSITORY, "sha": COMMIT, "siblings": []}).encode())
            elif path.startswith(f"/api/models/{REPOSITORY}/tree/"):
                sizes = {name: (parent / name).stat().st_size for name in sorted(files(parent))}
                tree = [{"type": "file", "path": name, "size": size, "oid": COMMIT} for name, size in sizes.items()]
                self.answer(json.dumps(tree).encode())
            elif path.startswith(f"/{REPOSITORY}/resolve/{COMMIT}/"):
                name = path.removeprefix(f"/{REPOSITORY}/resolve/{COMMIT}/")
                if self.command == "GET":
                    downloaded.append(name)
                self.answer((parent / name).read_bytes())
            else:
                self.send_response(404)
                self.send_header("X-Error-Code", "RepoNotFound")
                self.send_header("Content-Length", "0")
                self.end_headers()

        def answer(self, content: bytes) -> None:
            self.send_response(200)
            self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
            self.send_header("X-Repo-Commit", COMMIT)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(content)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", downloaded
    server.shutdown()
    server.server_close()


@pytest.fixture
def matgptq(hub: tuple[str, list[str]], tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    def run(*arguments: str, offline: str = "0") -> subprocess.CompletedProcess[str]:
        environment = {**os.environ, "HF_ENDPOINT": hub[0], "HF_HUB_OFFLINE": offline, "HF_HOME": str(tmp_path / "home")}
        command = [sys.executable, "-m", "matgptq_vllm.cli", *arguments]
        return subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)

    return run


def test_only_the_planes_of_the_width_are_downloaded(hub, matgptq, parent: Path, tmp_path: Path) -> None:
    run = matgptq("fetch", REPOSITORY, "--out", str(tmp_path / "copy"), "--max-width", "3")
    assert run.returncode == 0, run.stderr
    assert "for widths up to 3" in run.stdout
    planes = {name.split("-")[0] for name in hub[1] if name.startswith("planes/")}
    assert planes == {"planes/plane0", "planes/plane1"}
    assert files(tmp_path / "copy") == set(hub[1])
    assert len(dict(ParentReader(tmp_path / "copy").tensors(3)))
    missing = matgptq("fetch", "acme/other", "--out", str(tmp_path / "other"))
    assert missing.returncode == 2
    assert "no such repository" in missing.stderr
    offline = matgptq("fetch", REPOSITORY, "--out", str(tmp_path / "other"), offline="1")
    assert offline.returncode == 1
    assert "HF_HUB_OFFLINE" in offline.stderr
