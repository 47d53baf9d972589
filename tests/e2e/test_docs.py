"""The examples of the documentation that talk to a server: each is run as it stands, against one."""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from matgptq_vllm.core.checkpoint import ParentReader
from matgptq_vllm.core.checkpoint_writer import write_profiles
from matgptq_vllm.core.profile import Profile

from ..docs.pages import ROOT, Block, all_blocks
from .replica_server import ReplicaServer

pytestmark = pytest.mark.engine

BLOCKS = [block for block in all_blocks() if block.mode == "client"]
ADMIN_KEY = "key-of-the-administrator"
WRITTEN = "localhost:8000"
"""The server's address in the pages."""


@pytest.fixture(scope="module")
def server(parent_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ReplicaServer]:
    """A server of the name and with the mixed profile that the pages use."""
    folder = tmp_path_factory.mktemp("docs-server")
    shutil.copytree(parent_dir, folder / "parent")
    layers = list(ParentReader(parent_dir).layers)
    write_profiles(folder / "parent", [Profile("mix-3.0", {name: 4 if ".0." in name else 3 for name in layers})])
    environment = {"MATGPTQ_ADMIN_KEY": ADMIN_KEY}
    with ReplicaServer(
        folder / "parent", folder / "log", ["--served-model-name", "llama", "--max-model-len", "160"], environment=environment
    ) as running:
        yield running


def test_there_are_examples_of_both_kinds() -> None:
    assert {block.language for block in BLOCKS} == {"sh", "python"}
    assert len({block.page for block in BLOCKS}) >= 4


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: block.id)
def test_an_example_works(block: Block, server: ReplicaServer) -> None:
    assert WRITTEN in block.text
    text = block.text.replace(WRITTEN, server.url.removeprefix("http://"))
    if block.language == "python":
        command = [sys.executable, "-c", text]
    else:
        # A refusal must fail the example: curl alone is content with any answer.
        command = ["bash", "-euo", "pipefail", "-c", f'curl() {{ command curl -sS --fail-with-body "$@"; }}\n{text}']
    environment = {**os.environ, "ADMIN_KEY": ADMIN_KEY}
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200, cwd=ROOT)
    assert run.returncode == 0, run.stdout + run.stderr
    assert block.language == "python" or run.stdout.strip()
