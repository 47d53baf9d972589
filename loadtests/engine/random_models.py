"""Whole models with random weights: ``python -m loadtests.engine.random_models --variant ours --out DIR``.

What stands on disk is what a user would serve: a parent, or a model of stock vLLM, with weights, and a tokenizer that has a
word for every token. For load tests and loading times of shapes whose trained weights are not at hand; answers are noise.
"""

import argparse
import json
import math
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from loadtests.engine.folders import GROUP_SIZE, hf_config, peer_config
from loadtests.engine.shapes import SHAPES, Shape
from loadtests.engine.variants import OURS, PEERS
from matgptq_vllm.core.checkpoint_writer import ParentWriter
from matgptq_vllm.core.errors import MatGPTQError
from matgptq_vllm.core.manifest import CONFIG_FILE, INDEX_FILE
from matgptq_vllm.core.parent import SLICE_RULE_NAMES, ParentSpec
from matgptq_vllm.core.precision import PARENT_WIDTH
from matgptq_vllm.core.slicing import check_rule, levels

SHARD_BLOCKS = 4
"""Blocks of a peer's model in one file."""

CODE_DEVIATION = 73.9
"""Standard deviation of evenly drawn integers of 8 bits; scales make up for it."""


def write_parent(shape: Shape, rule: str, folder: Path, device: torch.device) -> None:
    """A parent with random codes; InputError if ``folder`` exists."""
    spec = ParentSpec(slice_rule=rule, group_size=GROUP_SIZE)
    chance = torch.Generator(device).manual_seed(0)
    deviation = levels(torch.arange(256, dtype=torch.uint8), PARENT_WIDTH, check_rule(rule)).std().item()
    with ParentWriter(folder, spec) as writer:
        _write_json(writer.directory / CONFIG_FILE, hf_config(shape, spec.to_dict()))
        _write_tokenizer(shape, writer.directory)
        for name, (n, k) in shape.linear_layers().items():
            codes = torch.randint(0, 256, (n, k), dtype=torch.uint8, device=device, generator=chance)
            writer.add_layer(name, codes, _scales(n, k, deviation, device))
        for name, tensor in _unquantized(shape, chance, device):
            writer.add_tensor(name, tensor)
        writer.finish()


def write_peer(shape: Shape, bits: int, folder: Path, device: torch.device) -> None:
    """A model of stock vLLM: bfloat16 (16 bits), or random packed integers."""
    folder.mkdir(parents=True)
    _write_json(folder / CONFIG_FILE, peer_config(shape, bits))
    _write_tokenizer(shape, folder)
    chance = torch.Generator(device).manual_seed(0)
    layers = list(shape.linear_layers().items())
    per_file = SHARD_BLOCKS * len(layers) // shape.layers
    shards = [
        (one for name, (n, k) in layers[start : start + per_file] for one in _peer_layer(name, n, k, bits, chance, device))
        for start in range(0, len(layers), per_file)
    ]
    index: dict[str, str] = {}
    for number, shard in enumerate([*shards, _unquantized(shape, chance, device)]):
        tensors = dict(shard)
        file = f"model-{number:05}.safetensors"
        save_file(tensors, folder / file, metadata={"format": "pt"})
        index |= dict.fromkeys(tensors, file)
    _write_json(folder / INDEX_FILE, {"weight_map": index})


def _peer_layer(
    name: str, n: int, k: int, bits: int, chance: torch.Generator, device: torch.device
) -> Iterator[tuple[str, torch.Tensor]]:
    """A layer's tensors: a weight, or codes in words of 32 bits, their scales and the shape."""
    if bits == 16:
        weight = torch.empty(n, k, dtype=torch.bfloat16, device=device).normal_(0, k**-0.5, generator=chance)
        yield f"{name}.weight", weight.cpu()
        return
    words = torch.empty(n, k * bits // 32, dtype=torch.int32, device=device)
    words.random_(-(2**31), 2**31 - 1, generator=chance)
    yield f"{name}.weight_packed", words.cpu()
    # Codes of fewer bits are as much smaller.
    yield f"{name}.weight_scale", _scales(n, k, CODE_DEVIATION / 2 ** (8 - bits), device).cpu()
    yield f"{name}.weight_shape", torch.tensor([n, k])


def _unquantized(shape: Shape, chance: torch.Generator, device: torch.device) -> Iterator[tuple[str, torch.Tensor]]:
    ones = torch.ones(shape.hidden, dtype=torch.bfloat16)
    yield "model.norm.weight", ones
    for layer in range(shape.layers):
        for name in ("input_layernorm", "post_attention_layernorm"):
            yield f"model.layers.{layer}.{name}.weight", ones.clone()
    for name in ("model.embed_tokens", "lm_head"):
        weight = torch.empty(shape.vocabulary, shape.hidden, dtype=torch.bfloat16, device=device)
        yield f"{name}.weight", weight.normal_(0, shape.hidden**-0.5, generator=chance).cpu()


def _scales(n: int, k: int, deviation: float, device: torch.device) -> torch.Tensor:
    """Such that outputs are about as large as inputs."""
    return torch.full((n, k // GROUP_SIZE), 1 / (deviation * math.sqrt(k)), dtype=torch.bfloat16, device=device)


def _write_tokenizer(shape: Shape, folder: Path) -> None:
    """A word per token, so that a prompt of random words has as many tokens."""
    words = {"<s>": 0, "</s>": 1} | {f"w{token}": token for token in range(2, shape.vocabulary)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="</s>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    # Without one, vLLM would decode the tokens of a stream without the spaces between them.
    tokenizer.decoder = decoders.WordPiece(prefix="##", cleanup=False)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>").save_pretrained(folder)


def _write_json(path: Path, document: object) -> None:
    path.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


def main(arguments: Sequence[str] | None = None) -> int:
    """Write one model; returns 2 if that cannot be."""
    parser = argparse.ArgumentParser(
        prog="python -m loadtests.engine.random_models", description="Write a whole model with random weights."
    )
    parser.add_argument("--out", type=Path, required=True, help="folder to create")
    parser.add_argument("--shape", choices=SHAPES, default="llama-8b", help="architecture (default: %(default)s)")
    parser.add_argument("--variant", choices=(OURS, *PEERS), default=OURS, help="format (default: %(default)s)")
    parser.add_argument("--rule", choices=SLICE_RULE_NAMES, default="curved", help="slice rule (default: %(default)s)")
    given = parser.parse_args(arguments)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        if given.variant == OURS:
            write_parent(SHAPES[given.shape], given.rule, given.out, device)
        else:
            write_peer(SHAPES[given.shape], PEERS[given.variant].bits, given.out, device)
    except (MatGPTQError, OSError) as error:
        print(f"loadtests: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
