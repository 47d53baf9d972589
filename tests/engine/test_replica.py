"""engine.replica: what one engine makes of a parent and its operator's options."""

import shutil
from pathlib import Path

import pytest
import torch

from matgptq_vllm.core.checkpoint import ParentReader
from matgptq_vllm.core.checkpoint_writer import write_profiles
from matgptq_vllm.core.errors import InputError
from matgptq_vllm.core.profile import Profile
from matgptq_vllm.core.replica import ReplicaOptions
from matgptq_vllm.engine.replica import MAX_PROFILES, Replica


def test_a_full_replica_holds_every_profile_and_plane(profiled_parent: Path) -> None:
    replica = Replica(profiled_parent, ReplicaOptions())
    assert replica.catalogue.profiles == ("2", "3", "4", "6", "8", "mix-kind", "mix-depth")
    assert (replica.catalogue.default, replica.num_planes) == ("8", 5)
    assert replica.average_bits()["6"] == 6
    assert replica.max_widths == {"2": 2, "3": 3, "4": 4, "6": 6, "8": 8, "mix-kind": 6, "mix-depth": 8}
    assert replica.bytes_per_weight()["6"] == 6 / 8 + 2 / 128
    query = [f"model.layers.2.self_attn.{name}_proj" for name in "qkv"]
    widths = replica.profile_widths(query)
    assert widths[:7].tolist() == [2, 3, 4, 6, 8, 6, 2]
    assert widths[7:].tolist() == [8] * (MAX_PROFILES - 7)


def test_a_narrow_replica_holds_only_what_fits(profiled_parent: Path) -> None:
    replica = Replica(profiled_parent, ReplicaOptions(max_width=6, default_precision="3"))
    assert replica.catalogue.profiles == ("2", "3", "4", "6", "mix-kind")
    assert (replica.catalogue.default, replica.num_planes) == ("3", 4)


def test_a_default_beyond_the_max_width_is_refused(profiled_parent: Path) -> None:
    with pytest.raises(InputError, match="'mix-depth' is not held by this replica; it holds 2, 3, 4"):
        Replica(profiled_parent, ReplicaOptions(max_width=4, default_precision="mix-depth"))


def test_more_profiles_than_a_replica_can_hold_are_refused(profiled_parent: Path, tmp_path: Path) -> None:
    parent = Path(shutil.copytree(profiled_parent, tmp_path / "parent"))
    layers = ParentReader(parent).layers
    write_profiles(parent, [Profile(f"copy-{i}", dict.fromkeys(layers, 4)) for i in range(MAX_PROFILES)])
    with pytest.raises(InputError, match=f"a replica can hold {MAX_PROFILES}; remove some from matgptq_profiles.json"):
        Replica(parent, ReplicaOptions())


def test_all_layers_share_the_buffers_of_a_step_which_begin_with_the_default_profile(profiled_parent: Path) -> None:
    replica = Replica(profiled_parent, ReplicaOptions(default_precision="3"))
    buffers = replica.step_buffers(33, torch.device("cpu"))
    assert buffers.token_profiles.tolist() == [1] * 33
    assert buffers.row_order.tolist() == [*range(33)]
    assert (buffers.step_profiles.shape, buffers.step_profiles[1]) == ((MAX_PROFILES,), 33)
    assert replica.step_buffers(33, torch.device("cpu")) is buffers
