from pathlib import Path

import pytest

from calibrate.model_card import base_model, licence_metadata, width_bytes, write_quality
from calibrate.run import run_calibration
from matgptq_vllm.core.checkpoint import ParentReader
from matgptq_vllm.core.errors import InputError
from matgptq_vllm.core.precision import WIDTHS
from matgptq_vllm.core.profile import uniform_profile
from matgptq_vllm.core.storage import profile_bytes


def test_the_card_says_what_the_parent_is_how_it_was_made_and_how_to_serve_it(tiny_options):
    options = tiny_options(damp=0.02)
    card = (run_calibration(options) / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: vllm\n")
    name = options.model.name
    for expected in (
        f"base_model: {name}\nbase_model_relation: quantized\n",
        f"Quantized from `{name}`, a `llama` model: 14 linear layers of its 2 blocks",
        "matgptq serve DIR",
        "| 4 | 4 | ",
        "| calibration text | `text.txt`: 12 windows of 32 tokens, seed 0 |",
        "| `damp` | `0.02` |",
        "matgptq evaluate DIR --text FILE --update-card",
    ):
        assert expected in card
    assert "license" not in card
    assert "not measured |" not in card


def test_a_parent_that_was_not_calibrated_says_so(tiny_options):
    card = (run_calibration(tiny_options(method="rtn", text=None)) / "README.md").read_text()
    assert "| calibration text | none |" in card
    assert card.count("not measured |") == len(WIDTHS)


@pytest.mark.parametrize(("rule", "group_size"), [("nested", 32), ("round", -1)])
def test_bytes_of_a_width_are_those_of_the_parent(tiny_options, rule, group_size):
    reader = ParentReader(run_calibration(tiny_options(method="rtn", slice_rule=rule, group_size=group_size)))
    for width in WIDTHS:
        expected = profile_bytes(reader, uniform_profile(width, reader.layers))
        assert width_bytes(reader.layers.values(), width, reader.spec) == expected


def test_the_base_model_is_the_name_on_the_hub_where_the_path_tells_it(tmp_path):
    assert base_model(tmp_path / "my-model") == "my-model"
    cached = Path("/cache/hub/models--meta-llama--Llama-3.1-8B/snapshots/0123abc")
    assert base_model(cached) == "meta-llama/Llama-3.1-8B"


def test_the_licence_is_that_of_the_original(tmp_path):
    assert licence_metadata(tmp_path) == ""
    (tmp_path / "LICENSE").write_text("terms")
    assert licence_metadata(tmp_path) == "license: other\nlicense_link: LICENSE\n"
    card = tmp_path / "README.md"
    card.write_text("no metadata\nlicense: mit\n")
    assert licence_metadata(tmp_path) == "license: other\nlicense_link: LICENSE\n"
    card.write_text("---\ntags: [x]\nlicense: llama3.1\nlicense_link: https://host/terms\n---\n# Model\nlicense: mit\n")
    assert licence_metadata(tmp_path) == "license: llama3.1\nlicense_link: https://host/terms\n"


def test_quality_goes_to_the_end_of_a_card_without_marks_and_between_them_afterwards(tmp_path):
    card = tmp_path / "README.md"
    card.write_text("# Mine\n")
    write_quality(tmp_path, "first")
    write_quality(tmp_path, "second\n")
    text = card.read_text()
    assert text.startswith("# Mine\n\n## Quality\n")
    assert "second" in text
    assert "first" not in text
    card.unlink()
    with pytest.raises(InputError, match=r"has no README\.md to update"):
        write_quality(tmp_path, "third")
