"""A small parent with ragged layers, written once and copied for each test that damages it."""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from matgptq_vllm.core.checkpoint_writer import SHARD_BYTES, ParentWriter
from matgptq_vllm.core.manifest import CONFIG_FILE
from matgptq_vllm.core.parent import ParentSpec
from matgptq_vllm.core.profile import Profile
from matgptq_vllm.core.slicing import num_groups

SHAPES = {"h.0.q_proj": (8, 40), "h.0.k_proj": (4, 40), "h.0.o_proj": (5, 33), "h.1.down_proj": (7, 130)}


@dataclass(frozen=True)
class ParentContent:
    """What a parent is made of, before it is written."""

    spec: ParentSpec
    layers: dict[str, tuple[torch.Tensor, torch.Tensor]]
    """Layer name -> codes uint8 [N, K], scales bfloat16 [N, groups]."""

    others: dict[str, torch.Tensor]
    profiles: list[Profile]

    def fill(self, writer: ParentWriter) -> None:
        """Everything but ``finish``."""
        config = {"model_type": "llama", "quantization_config": self.spec.to_dict()}
        (writer.directory / CONFIG_FILE).write_text(json.dumps(config), encoding="utf-8")
        for name, tensor in self.others.items():
            writer.add_tensor(name, tensor)
        for name, (codes, scales) in self.layers.items():
            writer.add_layer(name, codes, scales)

    def write(self, directory: Path, overwrite: bool = False, shard_bytes: int = SHARD_BYTES) -> Path:
        """A whole parent in ``directory``."""
        with ParentWriter(directory, self.spec, overwrite, shard_bytes) as writer:
            self.fill(writer)
            writer.finish(self.profiles)
        return directory


def make_content(seed: int = 0, rule: str = "nested", group_size: int = 32) -> ParentContent:
    generator = torch.Generator().manual_seed(seed)
    layers = {}
    for name, (n, k) in SHAPES.items():
        codes = torch.randint(0, 256, (n, k), dtype=torch.uint8, generator=generator)
        layers[name] = (codes, torch.rand((n, num_groups(k, group_size)), generator=generator).to(torch.bfloat16))
    others = {
        "embed.weight": torch.randn((11, 6), generator=generator).to(torch.bfloat16),
        "norm.weight": torch.randn(6, generator=generator),
        "step": torch.tensor(7),
    }
    widths = {"h.0.q_proj": 2, "h.0.k_proj": 2, "h.0.o_proj": 4, "h.1.down_proj": 3}
    return ParentContent(ParentSpec(rule, group_size), layers, others, [Profile("mix-3.0", widths)])


@pytest.fixture(scope="session")
def content() -> ParentContent:
    return make_content()


@pytest.fixture
def new_content() -> Callable[..., ParentContent]:
    return make_content


@pytest.fixture(scope="session")
def pristine(content: ParentContent, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return content.write(tmp_path_factory.mktemp("pristine") / "parent")


@pytest.fixture
def parent(pristine: Path, tmp_path: Path) -> Path:
    """A whole parent, one file per set, that the test may damage."""
    return Path(shutil.copytree(pristine, tmp_path / "parent"))


@pytest.fixture
def sharded(content: ParentContent, tmp_path: Path) -> Path:
    """The same parent in several shards per set."""
    return content.write(tmp_path / "sharded", shard_bytes=150)
