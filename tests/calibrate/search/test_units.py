import pytest

from calibrate.search.units import find_units, genome_profile
from matgptq_vllm.core.profile import Profile

BLOCK = {
    "self_attn.q_proj": (64, 40),
    "self_attn.k_proj": (16, 40),
    "self_attn.v_proj": (16, 40),
    "self_attn.o_proj": (40, 64),
    "mlp.gate_proj": (72, 40),
    "mlp.up_proj": (72, 40),
    "mlp.down_proj": (40, 72),
}
LAYERS = {f"model.layers.{block}.{name}": shape for block in range(2) for name, shape in BLOCK.items()}


def test_fused_layers_are_one_unit_with_their_common_shape():
    units = find_units(LAYERS)
    assert [unit.shape for unit in units] == [(96, 40), (40, 64), (144, 40), (40, 72)] * 2
    assert [len(unit.layers) for unit in units] == [3, 1, 2, 1] * 2
    assert sorted(layer for unit in units for layer in unit.layers) == sorted(LAYERS)


def test_layers_that_are_not_fused_are_units_of_their_own():
    layers = {"h.0.qkv_proj": (96, 40), "h.0.fc1": (80, 40), "h.0.k_proj": (8, 40)}
    assert [unit.layers for unit in find_units(layers)] == [(name,) for name in layers]


def test_a_genome_is_a_profile_of_all_layers():
    profile = genome_profile("mix", find_units(LAYERS), (2, 3, 4, 6, 8, 2, 3, 4))
    assert isinstance(profile, Profile)
    assert profile.widths.keys() == LAYERS.keys()
    assert profile.widths["model.layers.0.self_attn.v_proj"] == 2
    assert profile.widths["model.layers.0.mlp.up_proj"] == profile.widths["model.layers.0.mlp.gate_proj"] == 4
    assert profile.widths["model.layers.1.mlp.down_proj"] == 4
    with pytest.raises(ValueError, match="shorter"):
        genome_profile("mix", find_units(LAYERS), (2, 3))
