"""compat.model_folder: a repository of the Hub is fetched only in the part that a replica needs."""

import hashlib
import shutil
from pathlib import Path

import pytest

from matgptq_vllm.compat.model_folder import local_folder
from matgptq_vllm.core.checkpoint import ParentReader


def test_a_local_folder_is_used_as_it_is(profiled_parent: Path) -> None:
    assert local_folder(str(profiled_parent), None, 4) == profiled_parent


def test_of_a_cached_repository_only_the_needed_planes_must_be_there(
    profiled_parent: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The cache as the Hub's own client lays it out after downloading a repository without the lower planes.
    commit = hashlib.sha1(b"revision").hexdigest()
    repository = tmp_path / "models--team--parent"
    snapshot = repository / "snapshots" / commit
    shutil.copytree(profiled_parent, snapshot, ignore=shutil.ignore_patterns("plane3*", "plane4*"))
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    folder = local_folder("team/parent", None, 4)
    assert folder == snapshot
    assert sum(1 for _ in ParentReader(folder).tensors(4)) > 0
