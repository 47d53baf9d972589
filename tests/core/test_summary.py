"""core.summary: what a parent's small files tell, and which folders are refused."""

from pathlib import Path

import pytest

from matgptq_vllm.core.errors import FormatError, InputError
from matgptq_vllm.core.profile import PROFILES_FILE
from matgptq_vllm.core.summary import ParentSummary

from .conftest import ParentContent


def test_profiles_are_found_by_name_and_others_listed(parent: Path, content: ParentContent) -> None:
    reader = ParentSummary(parent)
    assert [profile.name for profile in reader.profiles()] == ["2", "3", "4", "6", "8", "mix-3.0"]
    assert [profile.name for profile in reader.profiles(3)] == ["2", "3"]
    assert reader.profile("mix-3.0") == content.profiles[0]
    assert set(reader.profile("6").widths.values()) == {6}
    with pytest.raises(InputError, match=r"no profile '5'; it has 2, 3, 4, 6, 8, mix-3\.0"):
        reader.profile("5")


def test_a_parent_without_a_profile_table_has_the_uniform_profiles(parent: Path) -> None:
    (parent / PROFILES_FILE).unlink()
    assert [profile.name for profile in ParentSummary(parent).profiles()] == ["2", "3", "4", "6", "8"]


def test_a_profile_table_of_another_parent_is_refused(parent: Path) -> None:
    (parent / PROFILES_FILE).write_text('{"version": 1, "profiles": {"mix": {"widths": {"x": 4}}}}')
    with pytest.raises(FormatError, match=rf"{PROFILES_FILE}: profile 'mix' does not cover"):
        ParentSummary(parent).profiles()


def test_a_missing_folder_and_a_file_are_the_callers_fault(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    for path in (tmp_path / "nothing", tmp_path / "file"):
        with pytest.raises(InputError, match="is not a folder"):
            ParentSummary(path)


@pytest.mark.parametrize("file", ["matgptq_manifest.json", "config.json"])
@pytest.mark.parametrize("damage", [None, b"", b"[]", b"{}", b'{"layers": {}}', b'{"parent": 3, "layers": 4}', b"\xff"])
def test_a_damaged_or_unfinished_parent_is_refused_naming_the_file(parent: Path, file: str, damage: bytes | None) -> None:
    path = parent / file
    path.unlink()
    if damage is not None:
        path.write_bytes(damage)
    with pytest.raises(FormatError, match=file):
        ParentSummary(parent)


@pytest.mark.parametrize("damage", [b"", b"[]", b'{"version": 1, "profiles": {"x": {"widths": {}}}}', b"\xff"])
def test_a_damaged_profile_table_is_refused(parent: Path, damage: bytes) -> None:
    (parent / PROFILES_FILE).write_bytes(damage)
    with pytest.raises(FormatError, match=r"matgptq_profiles\.json"):
        ParentSummary(parent).profiles()
