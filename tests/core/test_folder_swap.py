import os
from pathlib import Path

import pytest

from matgptq_vllm.core.folder_swap import partial_directory, put_in_place, restore_interrupted


def filled(directory: Path, text: str) -> Path:
    directory.mkdir()
    (directory / "file").write_text(text)
    return directory


@pytest.mark.parametrize("old", [False, True])
def test_the_whole_folder_takes_the_name_and_nothing_is_left_beside_it(tmp_path: Path, old: bool) -> None:
    target = tmp_path / "parent"
    if old:
        filled(target, "old")
    filled(partial_directory(target), "new")
    put_in_place(target)
    assert [path.name for path in tmp_path.iterdir()] == ["parent"]
    assert (target / "file").read_text() == "new"


def test_a_failing_rename_leaves_the_old_folder_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = filled(tmp_path / "parent", "old")
    partial = filled(partial_directory(target), "new")
    rename = Path.rename

    def failing(self: Path, other: Path) -> Path:
        if self == partial:
            raise OSError("no")
        return rename(self, other)

    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(OSError, match="no"):
        put_in_place(target)
    assert (target / "file").read_text() == "old"


@pytest.mark.parametrize("relative", [False, True])
def test_a_kill_between_the_renames_is_undone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, relative: bool) -> None:
    monkeypatch.chdir(tmp_path)
    filled(tmp_path / ".parent.replaced", "old")
    restore_interrupted(Path("parent") if relative else tmp_path / "parent")
    assert os.listdir(tmp_path) == ["parent"]


def test_a_folder_that_is_there_is_left_alone(tmp_path: Path) -> None:
    filled(tmp_path / "parent", "new")
    filled(tmp_path / ".parent.replaced", "old")
    restore_interrupted(tmp_path / "parent")
    assert (tmp_path / "parent" / "file").read_text() == "new"
