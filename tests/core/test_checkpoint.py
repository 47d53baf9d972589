"""core.checkpoint: what is written is read back, narrow replicas open few files, and every damage is refused by name."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors
import safetensors.torch
import torch

from matgptq_vllm.core.checkpoint import ParentReader
from matgptq_vllm.core.errors import FormatError, InputError
from matgptq_vllm.core.manifest import CONFIG_FILE, INDEX_FILE, MANIFEST_FILE
from matgptq_vllm.core.precision import WIDTHS
from matgptq_vllm.core.profile import PROFILES_FILE
from matgptq_vllm.core.slicing import SLICE_RULES

from .conftest import SHAPES, ParentContent

PLANES_OF_WIDTH = {
    "nested": {2: 1, 3: 2, 4: 3, 6: 4, 8: 5},
    "curved": {2: 1, 3: 2, 4: 3, 6: 4, 8: 5},
    "round": {2: 2, 3: 3, 4: 4, 6: 5, 8: 5},
}
SETS = ("model", *(f"planes/plane{plane}" for plane in range(5)))

every_width = pytest.mark.parametrize("width", WIDTHS)


def file_of(file_set: str) -> str:
    return f"{file_set}-00001-of-00001.safetensors"


def read_all(directory: Path, width: int = 8) -> dict[str, torch.Tensor]:
    reader = ParentReader(directory)
    reader.profiles()
    return dict(reader.tensors(width))


def read_or_message(directory: Path, width: int) -> tuple[dict[str, torch.Tensor], str]:
    try:
        return read_all(directory, width), ""
    except FormatError as error:
        return {}, str(error)


def edit_json(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    document = json.loads(path.read_text())
    change(document)
    path.write_text(json.dumps(document))


def edit_tensors(path: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = safetensors.torch.load_file(path)
    change(tensors)
    safetensors.torch.save_file(tensors, path)


def spans(path: Path) -> dict[str, tuple[int, int]]:
    """Tensor name -> first and last + 1 byte of its data in the file."""
    data = path.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:start])
    return {
        name: (start + entry["data_offsets"][0], start + entry["data_offsets"][1])
        for name, entry in header.items()
        if name != "__metadata__"
    }


# Reading what was written


@pytest.mark.parametrize("shard_bytes", [1, 150, 1000, 1 << 30])
@pytest.mark.parametrize("rule", SLICE_RULES)
@pytest.mark.parametrize("group_size", [32, 128, -1])
def test_a_parent_reads_back_as_written_whatever_its_shards(
    new_content: Callable[..., ParentContent], tmp_path: Path, shard_bytes: int, rule: str, group_size: int
) -> None:
    content = new_content(3, rule, group_size)
    reader = ParentReader(content.write(tmp_path / "p", shard_bytes=shard_bytes))
    assert reader.spec == content.spec
    assert reader.layers == SHAPES
    assert list(reader.layers) == list(content.layers)
    assert reader.stored_profiles() == content.profiles
    for name, (codes, scales) in content.layers.items():
        read_codes, read_scales = reader.layer(name)
        assert torch.equal(read_codes, codes)
        assert torch.equal(read_scales, scales)
        assert read_scales.dtype == torch.bfloat16
    others = dict(reader.unquantized())
    assert others.keys() == content.others.keys()
    for name, tensor in content.others.items():
        assert others[name].dtype == tensor.dtype
        assert torch.equal(others[name], tensor)


@every_width
@pytest.mark.parametrize("rule", SLICE_RULES)
def test_a_narrow_reader_gets_the_bits_that_its_width_reads(
    new_content: Callable[..., ParentContent], tmp_path: Path, width: int, rule: str
) -> None:
    content = new_content(4, rule)
    reader = ParentReader(content.write(tmp_path / "p", shard_bytes=150))
    planes = PLANES_OF_WIDTH[rule][width]
    kept = 0xFF << (8 - sum((2, 1, 1, 2, 2)[:planes])) & 0xFF
    assert reader.num_planes(width) == planes
    for name, (codes, _) in content.layers.items():
        assert torch.equal(reader.layer(name, width)[0], codes & kept)
    held = dict(reader.tensors(width))
    expected = {*content.others, *(f"{layer}.scales" for layer in SHAPES)}
    expected |= {f"{layer}.plane{plane}" for layer in SHAPES for plane in range(planes)}
    assert held.keys() == expected


@every_width
def test_a_reader_lists_exactly_the_files_of_its_planes(parent: Path, width: int) -> None:
    assert ParentReader(parent).files(width) == [file_of(name) for name in SETS[: 1 + PLANES_OF_WIDTH["nested"][width]]]


@every_width
def test_a_reader_lists_every_shard_of_its_planes_and_no_other_file(sharded: Path, width: int) -> None:
    sets = SETS[: 1 + PLANES_OF_WIDTH["nested"][width]]
    present = sorted(str(path.relative_to(sharded)) for path in sharded.rglob("*.safetensors"))
    assert all(
        len([name for name in present if name.startswith(f"{file_set}-")]) > 1 for file_set in ("model", "planes/plane0")
    )
    assert ParentReader(sharded).files(width) == [name for name in present if name.split("-")[0] in sets]


@every_width
def test_files_beyond_a_width_may_be_absent(sharded: Path, content: ParentContent, width: int) -> None:
    wanted = ParentReader(sharded).files(width)
    before = read_all(sharded, width)
    for path in sharded.rglob("*.safetensors"):
        if str(path.relative_to(sharded)) not in wanted:
            path.unlink()
    after = read_all(sharded, width)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert dict(ParentReader(sharded).unquantized()).keys() == content.others.keys()
    if width < 8:
        with pytest.raises(FormatError, match=r"plane\d-\d+-of-\d+\.safetensors: cannot be read"):
            ParentReader(sharded).layer("h.1.down_proj", 8)


def test_a_width_that_cannot_be_read_is_the_callers_fault(parent: Path) -> None:
    reader = ParentReader(parent)
    for method in (reader.files, reader.num_planes, lambda width: list(reader.tensors(width))):
        with pytest.raises(InputError, match="width 5"):
            method(5)


# Damaged weight files


@pytest.mark.parametrize("file_set", SETS)
def test_a_file_cut_off_at_any_byte_is_refused_naming_the_tensor_cut(parent: Path, file_set: str) -> None:
    path = parent / file_of(file_set)
    whole, tensors = path.read_bytes(), spans(path)
    data_start = min(start for start, _ in tensors.values())
    step = max(1, len(whole) // 150)
    for size in [*range(0, len(whole), step), data_start - 1, data_start, len(whole) - 1]:
        path.write_bytes(whole[:size])
        with pytest.raises(FormatError, match=path.name) as caught:
            read_all(parent)
        if size >= data_start:
            cut = min((end, name) for name, (_, end) in tensors.items() if end > size)[1]
            assert repr(cut) in str(caught.value)


@pytest.mark.parametrize("file_set", SETS)
def test_one_flipped_bit_in_any_tensor_is_refused_naming_it(parent: Path, file_set: str) -> None:
    path = parent / file_of(file_set)
    whole = path.read_bytes()
    for name, (start, end) in spans(path).items():
        for position in {start, (start + end) // 2, end - 1}:
            damaged = bytearray(whole)
            damaged[position] ^= 1 << (position % 8)
            path.write_bytes(damaged)
            with pytest.raises(FormatError, match=path.name) as caught:
                read_all(parent)
            assert repr(name) in str(caught.value)


@pytest.mark.parametrize("mask", [0x01, 0x20, 0x80])
@pytest.mark.parametrize("file_set", ["model", "planes/plane0"])
def test_one_altered_byte_in_the_header_never_alters_what_is_read(parent: Path, file_set: str, mask: int) -> None:
    path = parent / file_of(file_set)
    whole, expected = path.read_bytes(), read_all(parent, 2)
    refused = 0
    data_start = min(start for start, _ in spans(path).values())
    for position in range(data_start):
        damaged = bytearray(whole)
        damaged[position] ^= mask
        path.write_bytes(damaged)
        found, message = read_or_message(parent, 2)
        if message:
            assert path.name in message
            refused += 1
        else:  # padding, or the free-form metadata
            assert found.keys() == expected.keys()
            assert all(torch.equal(found[name], expected[name]) for name in found)
    assert refused > 0.75 * data_start


DAMAGES: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "reshaped": lambda tensor: tensor.t().contiguous().view(tensor.shape[::-1]),
    "flattened": lambda tensor: tensor.reshape(-1),
    "cut": lambda tensor: tensor[:-1].contiguous(),
    "of another type": lambda tensor: tensor.view(torch.int8 if tensor.dtype == torch.uint8 else torch.float16),
    "widened": lambda tensor: tensor.to(torch.float32),
    "emptied": lambda tensor: tensor[:0].contiguous(),
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize(
    ("file_set", "name"),
    [
        ("model", "embed.weight"),
        ("model", "h.0.o_proj.scales"),
        ("planes/plane0", "h.0.o_proj.plane0"),
        ("planes/plane4", "h.1.down_proj.plane4"),
    ],
)
def test_a_tensor_that_is_not_the_one_written_is_refused(parent: Path, file_set: str, name: str, damage: str) -> None:
    edit_tensors(parent / file_of(file_set), lambda tensors: tensors.update({name: DAMAGES[damage](tensors[name])}))
    with pytest.raises(FormatError, match=f"{file_of(file_set)}: tensor '{name}' is not what calibration wrote"):
        read_all(parent)


@pytest.mark.parametrize("rename", [False, True])
@pytest.mark.parametrize(
    ("file_set", "name"), [("model", "step"), ("model", "h.0.k_proj.scales"), ("planes/plane2", "h.0.q_proj.plane2")]
)
def test_a_tensor_that_is_removed_or_renamed_is_refused(parent: Path, file_set: str, name: str, rename: bool) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensor = tensors.pop(name)
        if rename:
            tensors[name + "x"] = tensor

    edit_tensors(parent / file_of(file_set), change)
    with pytest.raises(FormatError, match=f"{file_of(file_set)}: has no tensor '{name}'"):
        read_all(parent)


def test_the_data_of_another_tensor_of_the_same_shape_is_refused(parent: Path, content: ParentContent) -> None:
    other = ParentReader(parent).layout.split(content.layers["h.0.o_proj"][0])[2]
    edit_tensors(parent / file_of("planes/plane1"), lambda tensors: tensors.update({"h.0.o_proj.plane1": other}))
    with pytest.raises(FormatError, match=r"plane1-.*: tensor 'h\.0\.o_proj\.plane1' is not what"):
        read_all(parent, 3)


def test_a_file_under_the_name_of_another_is_refused(parent: Path) -> None:
    shutil.copy(parent / file_of("planes/plane2"), parent / file_of("planes/plane1"))
    with pytest.raises(FormatError, match=f"{file_of('planes/plane1')}: has no tensor"):
        read_all(parent, 3)


@pytest.mark.parametrize(
    "content_of_file",
    [b"", b"x", bytes(8), b"<!DOCTYPE html><html>404</html>", b"version https://git-lfs", bytes(5000), b"\xff" * 500],
)
def test_a_file_of_another_kind_is_refused(parent: Path, content_of_file: bytes) -> None:
    (parent / file_of("planes/plane0")).write_bytes(content_of_file)
    with pytest.raises(FormatError, match=file_of("planes/plane0")):
        read_all(parent, 2)


@pytest.mark.parametrize(
    "header",
    [b"[]", b"3", b'{"a":1}', b'{"a":{}}', b'{"a":{"data_offsets":[]}}', b'{"a":{"data_offsets":[0]}}',
     b'{"a":{"data_offsets":["x","y"]}}', b'{"a":{"data_offsets":null}}', b"\xff\xfe", b'{"a":{"data_offsets":[0,1]}}'],
)  # fmt: skip
def test_a_header_of_another_kind_is_refused(parent: Path, header: bytes) -> None:
    (parent / file_of("planes/plane0")).write_bytes(len(header).to_bytes(8, "little") + header + bytes(16))
    with pytest.raises(FormatError, match=file_of("planes/plane0")):
        read_all(parent, 2)


def test_foreign_safetensors_are_refused(parent: Path) -> None:
    safetensors.torch.save_file({"model.embed.weight": torch.zeros(4, 4)}, parent / file_of("model"))
    with pytest.raises(FormatError, match=f"{file_of('model')}: has no tensor"):
        read_all(parent)


@pytest.mark.parametrize("file_set", SETS)
def test_a_file_that_is_missing_or_a_folder_is_refused(parent: Path, file_set: str) -> None:
    path = parent / file_of(file_set)
    path.unlink()
    with pytest.raises(FormatError, match=f"{path.name}: cannot be read"):
        read_all(parent)
    path.mkdir()
    with pytest.raises(FormatError, match=f"{path.name}: cannot be read"):
        read_all(parent)


def test_damage_beyond_the_width_that_is_read_does_no_harm(parent: Path) -> None:
    expected = read_all(parent, 4)
    (parent / file_of("planes/plane3")).write_bytes(b"damaged")
    assert read_all(parent, 4).keys() == expected.keys()
    with pytest.raises(FormatError, match=file_of("planes/plane3")):
        read_all(parent, 6)


# Damaged tables


@pytest.mark.parametrize(
    "change",
    [
        lambda index: index.pop("h.0.o_proj.plane3"),
        lambda index: index.pop("norm.weight"),
        lambda index: index.update({"extra.weight": file_of("model")}),
        lambda index: index.clear(),
    ],
)
def test_an_index_of_other_tensors_is_refused(parent: Path, change: Callable[[dict[str, str]], object]) -> None:
    edit_json(parent / INDEX_FILE, lambda document: change(document["weight_map"]))
    for read in (lambda: read_all(parent, 2), lambda: list(ParentReader(parent).unquantized())):
        with pytest.raises(FormatError, match=f"{INDEX_FILE}: its tensors differ"):
            read()
    with pytest.raises(FormatError, match=INDEX_FILE):
        ParentReader(parent).layer("h.0.o_proj")


@pytest.mark.parametrize(
    "file", ["../model.safetensors", "planes/../x", "planes/a/b", "/etc/hostname", "a\\b", None, 3, ["x"], {}]
)
def test_an_index_that_leads_elsewhere_is_refused(parent: Path, file: Any) -> None:
    edit_json(parent / INDEX_FILE, lambda document: document["weight_map"].update({"norm.weight": file}))
    with pytest.raises(FormatError, match=f"{INDEX_FILE}: weight_map must map"):
        read_all(parent)


@pytest.mark.parametrize("file", [file_of("planes/plane1"), "absent.safetensors", "", "..", CONFIG_FILE])
def test_an_index_that_names_the_wrong_file_is_refused(parent: Path, file: str) -> None:
    edit_json(parent / INDEX_FILE, lambda document: document["weight_map"].update({"h.0.o_proj.plane0": file}))
    with pytest.raises(FormatError):
        read_all(parent, 2)


@pytest.mark.parametrize("table", [INDEX_FILE, MANIFEST_FILE, CONFIG_FILE])
def test_a_missing_table_is_refused_by_name(parent: Path, table: str) -> None:
    (parent / table).unlink()
    with pytest.raises(FormatError, match=f"has no {table}"):
        read_all(parent)


@pytest.mark.parametrize("table", [INDEX_FILE, MANIFEST_FILE, CONFIG_FILE, PROFILES_FILE])
def test_a_table_cut_off_at_any_byte_is_refused_by_name(parent: Path, table: str) -> None:
    path = parent / table
    whole = path.read_bytes().rstrip()
    for size in range(0, len(whole), max(1, len(whole) // 100)):
        path.write_bytes(whole[:size])
        with pytest.raises(FormatError, match=table):
            read_all(parent)


@pytest.mark.parametrize("table", [INDEX_FILE, MANIFEST_FILE, CONFIG_FILE, PROFILES_FILE])
@pytest.mark.parametrize("text", [b"[]", b"null", b"3", b'"x"', b"\xff\xfe\x00", b"{}", b"<html>"])
def test_a_table_of_another_kind_is_refused_by_name(parent: Path, table: str, text: bytes) -> None:
    (parent / table).write_bytes(text)
    with pytest.raises(FormatError, match=table):
        read_all(parent)


@pytest.mark.parametrize("mask", [0x01, 0x04, 0x20])
def test_one_altered_byte_in_the_manifest_is_refused(parent: Path, mask: int) -> None:
    path = parent / MANIFEST_FILE
    whole, expected = path.read_bytes(), read_all(parent)
    for position in range(0, len(whole), 3):
        if whole[position : position + 1].isspace():
            continue
        damaged = bytearray(whole)
        damaged[position] ^= mask
        path.write_bytes(damaged)
        with pytest.raises(FormatError, match=r"matgptq_manifest\.json"):
            ParentReader(parent)
    path.write_bytes(whole)
    assert read_all(parent).keys() == expected.keys()


@pytest.mark.parametrize(
    "change",
    [
        lambda manifest: manifest["layers"].update({"h.1.down_proj": [7, 129]}),
        lambda manifest: manifest["layers"].update({"h.1.down_proj": ["a", None]}),
        lambda manifest: manifest["layers"].pop("h.0.o_proj"),
        lambda manifest: manifest["layers"].update({"h.9.o_proj": [5, 33]}),
        lambda manifest: manifest["sha256"].pop("step"),
        lambda manifest: manifest["sha256"].update({"step": "0" * 64}),
        lambda manifest: manifest.update({"layers": []}),
        lambda manifest: manifest.update({"sha256": ["ab"]}),
        lambda manifest: manifest.update({"parent": None}),
        lambda manifest: manifest.update({"checksum": None}),
        lambda manifest: manifest.pop("layers"),
        lambda manifest: manifest.pop("sha256"),
        lambda manifest: manifest.pop("parent"),
        lambda manifest: manifest.pop("checksum"),
    ],
)
def test_an_edited_manifest_is_refused(parent: Path, change: Callable[[dict[str, Any]], object]) -> None:
    edit_json(parent / MANIFEST_FILE, change)
    with pytest.raises(FormatError, match=r"matgptq_manifest\.json"):
        ParentReader(parent)


@pytest.mark.parametrize(
    "change",
    [
        {"slice_rule": "round"},
        {"group_size": 128},
        {"scale_dtype": "float16"},
        {"plane_widths": [1] * 8},
        {"plane_widths": "21122"},
        {"quant_method": "awq"},
        {"format_version": 1},
        {"extra": 1},
    ],
)
def test_a_config_that_states_another_spec_is_refused(parent: Path, change: dict[str, Any]) -> None:
    edit_json(parent / CONFIG_FILE, lambda config: config["quantization_config"].update(change))
    with pytest.raises(FormatError, match=r"config\.json: "):
        ParentReader(parent)


@pytest.mark.parametrize("value", [None, [], "matgptq", {}, 3, False])
def test_a_config_without_a_spec_is_refused(parent: Path, value: Any) -> None:
    edit_json(parent / CONFIG_FILE, lambda config: config.update(quantization_config=value))
    with pytest.raises(FormatError, match=r"config\.json: "):
        ParentReader(parent)


def test_other_fields_of_the_config_may_be_edited(parent: Path) -> None:
    edit_json(parent / CONFIG_FILE, lambda config: config.update(max_position_embeddings=1))
    read_all(parent)


def test_a_spec_edited_alike_in_both_files_is_refused(parent: Path) -> None:
    edit_json(parent / CONFIG_FILE, lambda config: config["quantization_config"].update(slice_rule="round"))
    edit_json(parent / MANIFEST_FILE, lambda manifest: manifest["parent"].update(slice_rule="round"))
    with pytest.raises(FormatError, match=r"matgptq_manifest\.json: its checksum"):
        ParentReader(parent)


@pytest.mark.parametrize("kind", ["empty", "another model"])
def test_what_is_not_a_parent_is_refused_by_path(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "thing"
    path.mkdir()
    if kind == "another model":
        (path / CONFIG_FILE).write_text('{"model_type": "llama"}')
        safetensors.torch.save_file({"w": torch.zeros(2)}, path / "model.safetensors")
    with pytest.raises(FormatError, match="thing"):
        ParentReader(path)


def test_opening_a_parent_reads_no_weights(parent: Path) -> None:
    for path in parent.rglob("*.safetensors"):
        path.unlink()
    reader = ParentReader(parent)
    assert len(reader.files(4)) == 4
    shutil.rmtree(parent)
    with pytest.raises(FormatError, match="cannot be read"):
        next(reader.tensors(2))
