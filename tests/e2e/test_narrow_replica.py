"""A replica of max width 4 behind an API key: what it opens, what it holds, what it refuses, who may ask."""

from collections.abc import Iterator
from pathlib import Path

import inotify_simple
import pytest

from matgptq_vllm.core.checkpoint import ParentReader

from .replica_server import MODEL_NAME, ReplicaServer

pytestmark = pytest.mark.engine

KEY = "key-of-the-test"


class OpenedFiles:
    """Paths within a folder of the files opened since it was made, by any process."""

    def __init__(self, directory: Path):
        self._inotify = inotify_simple.INotify()
        folders = ["", *(folder.name for folder in directory.iterdir() if folder.is_dir())]
        self._folders = {self._inotify.add_watch(directory / name, inotify_simple.flags.OPEN): name for name in folders}

    def names(self) -> set[str]:
        events = [event for event in self._inotify.read(timeout=0) if not event.mask & inotify_simple.flags.ISDIR]
        return {str(Path(self._folders[event.wd]) / event.name) for event in events}


@pytest.fixture(scope="module")
def opened_and_server(
    profiled_parent: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[set[str], ReplicaServer]]:
    watch = OpenedFiles(profiled_parent)
    log = tmp_path_factory.mktemp("narrow") / "server.log"
    arguments = ["--max-width", "4", "--default-precision", "3", "--api-key", KEY]
    with ReplicaServer(profiled_parent, log, arguments) as server:
        yield watch.names(), server


@pytest.fixture
def client(opened_and_server):
    with opened_and_server[1].client({"Authorization": f"Bearer {KEY}"}) as client:
        yield client


def test_no_file_of_the_lower_planes_is_opened(opened_and_server, profiled_parent: Path) -> None:
    opened = {name for name in opened_and_server[0] if name.endswith(".safetensors")}
    assert opened == set(ParentReader(profiled_parent).files(max_width=4))
    # There are two files that were not: the planes of bits 5 and 6, and of bits 7 and 8.
    everything = {str(path.relative_to(profiled_parent)) for path in profiled_parent.rglob("*.safetensors")}
    assert {name.split("-")[0] for name in everything - opened} == {"planes/plane3", "planes/plane4"}


def test_half_the_code_bytes_are_held(client, profiled_parent: Path) -> None:
    shown = client.get("/v1/precisions").json()
    num_weights = sum(n * k for n, k in ParentReader(profiled_parent).layers.values())
    assert shown["workers"][0]["code_bytes"] == num_weights // 2
    held = sum(shown["workers"][0][kind] for kind in ("code_bytes", "scale_bytes", "other_bytes"))
    assert held == shown["memory"]["weight_bytes"]["4"]  # computed from headers, held by the loaded model
    assert [profile["id"] for profile in shown["data"]] == ["2", "3", "4"]
    assert (shown["default"], shown["max_width"]) == ("3", 4)


def test_wider_precisions_are_refused_with_what_there_is(client) -> None:
    body = {"model": MODEL_NAME, "prompt": "He", "max_tokens": 2}
    for precision in ("6", "8", "mix-kind", "mix-depth"):
        response = client.post("/v1/completions", json=body, headers={"X-Precision": precision})
        assert response.status_code == 400
        assert "2, 3, 4" in response.json()["error"]["message"]
    default = client.post("/v1/completions", json=body)
    assert (default.status_code, default.headers["x-precision"]) == (200, "3")


def test_selection_happens_inside_authentication(opened_and_server, client) -> None:
    counters = [line for line in client.get("/metrics").text.splitlines() if line.startswith("matgptq_re")]
    body = {"model": MODEL_NAME, "prompt": "He", "max_tokens": 2}
    with opened_and_server[1].client() as stranger:
        for headers in ({}, {"Authorization": "Bearer wrong"}):
            for precision in ("4", "5"):
                response = stranger.post("/v1/completions", json=body, headers={**headers, "X-Precision": precision})
                assert response.status_code == 401
                assert "x-precision" not in response.headers
        assert stranger.get("/v1/precisions").status_code == 401
    assert [line for line in client.get("/metrics").text.splitlines() if line.startswith("matgptq_re")] == counters
