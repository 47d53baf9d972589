import json
from dataclasses import asdict, fields
from pathlib import Path

import pytest

from matgptq_vllm.core.errors import FormatError
from matgptq_vllm.kernels import tables
from matgptq_vllm.kernels.config import Config
from matgptq_vllm.kernels.tables import Key, Table

GPU = "NVIDIA H200"
CONFIG = Config(16, 32, 4, 2)
KEY = Key(4096, 14336, 128, "several", 16)
TABLE = Table({KEY: CONFIG, Key(896, 4864, -1, "4", 8): Config(16, 64, 8, 1, 3, max_registers=128)}, {(4096, 14336): 384})


def document(**changes: object) -> dict:
    """A table as in its file, with fields of its only configuration replaced."""
    config = {**asdict(CONFIG), **changes}
    return {"format": 2, "gpu": GPU, "configs": {"4096x14336": {"128": {"several": {"16": config}}}}, "dense_from": {}}


@pytest.mark.parametrize(("m", "expected"), [(1, 8), (8, 8), (9, 16), (16, 16), (17, 32), (64, 64), (65, 128), (5000, 8192)])
def test_a_range_is_named_by_its_largest_m(m: int, expected: int):
    assert tables.bucket(m) == expected


@pytest.mark.parametrize(("widths", "expected"), [((4,), "4"), ((8,), "8"), ((4, 8), "several"), ((2, 3, 4, 6, 8), "several")])
def test_one_width_is_a_class_of_its_own(widths: tuple[int, ...], expected: str):
    assert tables.widths_class(widths) == expected


@pytest.mark.parametrize(
    ("gpu", "expected"),
    [(GPU, "nvidia_h200.json"), ("NVIDIA H100 80GB HBM3", "nvidia_h100_80gb_hbm3.json"), (" RTX (6000) ", "rtx_6000.json")],
)
def test_file_names_have_plain_characters_only(gpu: str, expected: str):
    assert tables.file_name(gpu) == expected


def test_a_table_comes_back_as_it_was_written(tmp_path: Path):
    path = tmp_path / "new" / "table.json"
    tables.write(path, TABLE, GPU)
    assert tables.read(path) == TABLE
    assert json.loads(path.read_text())["gpu"] == GPU
    assert [file.name for file in path.parent.iterdir()] == ["table.json"]


def test_a_configuration_is_one_line(tmp_path: Path):
    tables.write(tmp_path / "table.json", TABLE, GPU)
    assert sum("block_m" in line and "split_k" in line for line in (tmp_path / "table.json").read_text().splitlines()) == 2


def test_a_failed_write_leaves_the_old_table_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "table.json"
    tables.write(path, TABLE, GPU)

    def fail(*_: object) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(tables.os, "replace", fail)
    with pytest.raises(OSError, match="no space left"):
        tables.write(path, Table(), GPU)
    assert tables.read(path) == TABLE
    assert list(tmp_path.iterdir()) == [path]


def test_fields_with_a_default_may_be_left_out(tmp_path: Path):
    given = document()
    config = given["configs"]["4096x14336"]["128"]["several"]["16"]
    for name in ("split_k", "max_registers", "pdl"):
        del config[name]
    (tmp_path / "table.json").write_text(json.dumps(given))
    assert tables.read(tmp_path / "table.json").configs == {KEY: CONFIG}


def test_every_field_of_a_configuration_is_checked():
    assert tables._ALLOWED.keys() == {field.name for field in fields(Config)}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "cannot be read as JSON"),
        ("[]", "has format None"),
        (json.dumps({**document(), "format": 1}), "has format 1; this release reads 2"),
        (json.dumps({**document(), "format": 3}), "has format 3; this release reads 2"),
        (json.dumps({"format": 2, "configs": []}), "configs: .* is not an object"),
        (json.dumps({"format": 2, "configs": {"4096": {}}}), "configs / 4096: '4096' is not a shape"),
        (
            json.dumps({"format": 2, "configs": {"1x2": {"128": {"4": {"12": {}}}}}}),
            "1x2 / 128 / 4 / 12: 12 names no range of M",
        ),
        (json.dumps({"format": 2, "configs": {"1x2": {"128": {"4": {"4": {}}}}}}), "4 names no range of M"),
        (json.dumps({"format": 2, "configs": {"1x2": {"100": {"4": {"16": {}}}}}}), "group size 100 is not one of"),
        (json.dumps({"format": 2, "configs": {"1x2": {"128": {"5": {"16": {}}}}}}), "widths '5' are not one of several, 2, 3"),
        (json.dumps({"format": 2, "configs": {"1x2": {"128": {"4": {"x": {}}}}}}), "'x' is not a whole number"),
        (json.dumps({"format": 2, "configs": {"1x2": {"128": {"4": {"16": 3}}}}}), "3 is not a configuration"),
        (
            json.dumps(document(num_stages=3)),
            r"4096x14336 / 128 / several / 16: fields \['num_stages'\] are missing or unknown",
        ),
        (json.dumps(document(block_m=24)), "block_m 24 is not supported; it may be 8, 16, 32;"),
        (json.dumps(document(block_m=16.0)), "block_m 16.0 is not supported"),
        (json.dumps(document(num_warps=6)), "num_warps 6 is not supported; it may be 1, 2, 4, 8, 16;"),
        (json.dumps(document(depth=0)), "depth 0 is not supported; it may be 1, 2, 3, 4;"),
        (json.dumps(document(split_k=True)), "split_k True is not supported; it may be 1, 2, ..., 64"),
        (json.dumps(document(max_registers=100)), "max_registers 100 is not supported; it may be null, 32, ..., 248"),
        (json.dumps({"format": 2, "dense_from": {"4096x4096": 0}}), "dense_from / 4096x4096: 0 is not a number of rows"),
    ],
)
def test_a_damaged_table_is_named_with_the_entry_and_the_way_out(content: str, message: str, tmp_path: Path):
    path = tmp_path / "table.json"
    path.write_text(content)
    with pytest.raises(FormatError, match=message) as caught:
        tables.read(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert "run `matgptq tune`" in str(caught.value)


def test_later_directories_win_entry_by_entry(tmp_path: Path):
    mine = Config(32, 64, 4, 1)
    tables.write(tmp_path / "shipped" / "nvidia_h200.json", TABLE, GPU)
    tables.write(tmp_path / "user" / "nvidia_h200.json", Table({KEY: mine}, {(8, 8): 99}), GPU)
    table = tables.load(GPU, [tmp_path / "shipped", tmp_path / "absent", tmp_path / "user"])
    assert table.configs == {**TABLE.configs, KEY: mine}
    assert table.dense_from == {(4096, 14336): 384, (8, 8): 99}
    assert tables.load("NVIDIA H100", [tmp_path / "shipped", tmp_path / "user"]) == Table()


def test_the_users_directory_is_the_variable_or_a_cache():
    assert tables.user_directory({"MATGPTQ_TUNING_DIR": "/t", "XDG_CACHE_HOME": "/c"}) == Path("/t")
    assert tables.user_directory({"XDG_CACHE_HOME": "/c"}) == Path("/c/matgptq/tuning")
    assert tables.user_directory({}) == Path.home() / ".cache/matgptq/tuning"


def test_every_shipped_table_can_be_read_and_is_named_after_its_gpu():
    for path in tables.SHIPPED.glob("*.json"):
        assert tables.read(path).configs
        assert tables.file_name(json.loads(path.read_text())["gpu"]) == path.name
