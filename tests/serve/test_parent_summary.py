"""The early look at a parent agrees with the full reader and refuses what is none."""

import json

import pytest

from matgptq_vllm.core import manifest
from matgptq_vllm.core.errors import FormatError, InputError
from serve import parent_summary
from serve.parent_summary import read_parent_summary


def test_profiles_of_a_width_are_found_in_index_order(parent_folder):
    summary = read_parent_summary(parent_folder)
    assert [profile.name for profile in summary.profiles(8)] == ["2", "3", "4", "6", "8", "mix-3.0", "mix-6.0"]
    assert [profile.name for profile in summary.profiles(4)] == ["2", "3", "4", "mix-3.0"]


def test_a_parent_without_a_profile_table_has_the_uniform_profiles(parent_folder):
    (parent_folder / "matgptq_profiles.json").unlink()
    assert [profile.name for profile in read_parent_summary(parent_folder).profiles(3)] == ["2", "3"]


def test_it_reads_what_the_full_reader_reads(parent_folder):
    full = manifest.read_manifest(parent_folder)
    summary = read_parent_summary(parent_folder)
    assert (summary.spec, summary.layers) == (full.spec, tuple(full.layers))


def test_file_names_are_those_of_the_format():
    assert parent_summary.MANIFEST_FILE == manifest.MANIFEST_FILE
    assert parent_summary.CONFIG_FILE == manifest.CONFIG_FILE


def test_a_missing_folder_is_the_callers_mistake(tmp_path):
    with pytest.raises(InputError, match="not a folder"):
        read_parent_summary(tmp_path / "nothing")


@pytest.mark.parametrize("file", ["matgptq_manifest.json", "config.json"])
@pytest.mark.parametrize("content", [None, b"", b"[]", b"{}", b'{"layers": {}}', b'{"parent": 3, "layers": 4}', b"\xff"])
def test_a_damaged_or_unfinished_parent_is_refused_naming_the_file(parent_folder, file, content):
    path = parent_folder / file
    path.unlink()
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(FormatError, match=file):
        read_parent_summary(parent_folder)


@pytest.mark.parametrize("content", [b"", b"[]", b'{"version": 1, "profiles": {"x": {"widths": {}}}}', b"\xff"])
def test_a_damaged_profile_table_is_refused(parent_folder, content):
    (parent_folder / "matgptq_profiles.json").write_bytes(content)
    with pytest.raises(FormatError, match=r"matgptq_profiles\.json"):
        read_parent_summary(parent_folder)


def test_a_config_that_disagrees_with_the_manifest_is_refused(parent_folder):
    path = parent_folder / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"]["group_size"] = 64
    path.write_text(json.dumps(config))
    with pytest.raises(FormatError, match="differs"):
        read_parent_summary(parent_folder)
