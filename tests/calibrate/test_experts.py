"""Mixtures of experts in the form of their checkpoints: the same model, other modules."""

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    GptOssConfig,
    LlamaConfig,
    MixtralConfig,
    PhimoeConfig,
    Qwen2MoeConfig,
    Qwen3MoeConfig,
)

from calibrate.experts import Expert, ExpertNames, expert_names, mixtures, separate_experts
from calibrate.few_tokens import tokens_wanted, top_up
from calibrate.matching_inputs import OriginalInputs
from calibrate.model import Block, find_blocks, skeleton
from calibrate.statistics import InputStatistics
from calibrate.step_memory import steps_in_memory
from matgptq_vllm.core.errors import UnsupportedError

SIZES = {
    "hidden_size": 40,
    "intermediate_size": 72,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 50,
    "num_experts_per_tok": 2,
}
CONFIGS = {
    "qwen3_moe": lambda: Qwen3MoeConfig(**SIZES, num_experts=5, moe_intermediate_size=24, head_dim=16, mlp_only_layers=[0]),
    "qwen2_moe": lambda: Qwen2MoeConfig(
        **SIZES, num_experts=5, moe_intermediate_size=24, shared_expert_intermediate_size=16, decoder_sparse_step=1
    ),
    "mixtral": lambda: MixtralConfig(**SIZES, num_local_experts=4),
}


@pytest.mark.parametrize("family", CONFIGS)
def test_separate_experts_are_the_same_model_under_the_names_of_the_checkpoint(family, tmp_path):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[family]()).eval()
    model.save_pretrained(tmp_path)
    tokens = torch.randint(0, 50, (3, 17))
    with torch.no_grad():
        expected = model(tokens).logits
        model = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
        separate_experts(model)
        # Another summation order is all that may differ.
        torch.testing.assert_close(model(tokens).logits, expected, rtol=1e-5, atol=1e-5)
    stored = set(load_file(tmp_path / "model.safetensors"))
    assert set(model.state_dict()) == stored
    assert set(skeleton(model.config).state_dict()) == stored


def test_weights_of_separate_experts_are_views_of_the_fused_ones():
    model = AutoModelForCausalLM.from_config(CONFIGS["mixtral"]())
    fused = model.model.layers[1].mlp.experts.gate_up_proj
    separate_experts(model)
    expert = model.get_submodule("model.layers.1.block_sparse_moe.experts.2")
    assert torch.equal(torch.cat([expert.w1.weight, expert.w3.weight]), fused[2])
    assert expert.w3.weight.data_ptr() == fused[2, 72:].data_ptr()


def test_routers_and_gates_of_shared_experts_stay_and_everything_else_is_quantized():
    block = find_blocks(skeleton(CONFIGS["qwen2_moe"]()))[1]
    leaves = {name.removeprefix("model.layers.1.") for name in block.linears}
    parts = ("gate_proj", "up_proj", "down_proj")
    assert leaves == {
        *(f"self_attn.{part}_proj" for part in "qkvo"),
        *(f"mlp.experts.{index}.{part}" for index in range(5) for part in parts),
        *(f"mlp.shared_expert.{part}" for part in parts),
    }
    assert [len(names) for names in block.parallel] == [10, 5]
    assert block.experts.keys() == block.parallel[0] | block.parallel[1]


def test_a_block_without_experts_in_a_model_with_them_is_as_any_other():
    dense, mixture = find_blocks(skeleton(CONFIGS["qwen3_moe"]()))
    assert list(dense.linears)[4:] == [f"model.layers.0.mlp.{part}_proj" for part in ("gate", "up", "down")]
    assert (dense.parallel, dense.experts) == ((), {})
    assert len(mixture.experts) == 15


def test_every_expert_is_called_with_the_tokens_routed_to_it_and_knows_them():
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS["mixtral"]()).eval()
    separate_experts(model)
    ((_, _, experts),) = mixtures(model.model.layers[0], "")
    hidden = torch.randn(6, 40)
    chosen = torch.tensor([[3, 0], [0, 3], [1, 3], [3, 1], [0, 1], [1, 0]])
    experts(hidden, chosen, torch.ones(6, 2))
    assert [expert.tokens.tolist() for expert in experts.children()] == [[0, 1, 4, 5], [2, 3, 4, 5], [], [0, 1, 2, 3]]


@pytest.mark.parametrize(
    ("config", "named"),
    [
        (GptOssConfig(**SIZES, num_local_experts=4, head_dim=16), r"model\.layers\.0\.mlp\.\w+: GptOss\w+\.\w+ \["),
        (PhimoeConfig(**SIZES, num_local_experts=4), r"model\.layers\.0\.mlp\.\w+: Phimoe\w+\.\w+ \["),
    ],
)
def test_experts_of_another_form_are_refused_by_name_and_class(config, named):
    with pytest.raises(UnsupportedError, match=named):
        find_blocks(skeleton(config))


def test_names_are_read_off_the_conversions_of_transformers():
    assert expert_names("mixtral") == ExpertNames("w1", "w3", "w2", ("mlp", "block_sparse_moe"))
    assert expert_names("qwen3_moe") == ExpertNames("gate_proj", "up_proj", "down_proj", None)
    assert [expert_names(name) for name in ("phimoe", "gpt_oss", "llama", LlamaConfig().model_type)] == [None] * 4


def make_expert(tokens: list[int]) -> Expert:
    names = ExpertNames("gate", "up", "down", None)
    expert = Expert(torch.zeros(3, 4), torch.zeros(3, 4), torch.zeros(4, 3), names, nn.Identity())
    expert.tokens = torch.tensor(tokens, dtype=torch.int64)
    return expert


def test_inputs_are_matched_by_token_and_a_token_sent_elsewhere_stands_for_itself():
    originals, group = OriginalInputs(), ("gate", "up")
    of_token = torch.arange(10.0)[:, None].expand(10, 4)
    expert = make_expert([1, 4, 7])
    originals.keep(group, of_token[expert.tokens], expert)
    expert.tokens = torch.tensor([0, 4, 5, 7, 9])
    found = originals.matching(group, -of_token[expert.tokens], expert)
    assert found[:, 0].tolist() == [0, 4, -5, 7, -9]
    expert.tokens = torch.tensor([], dtype=torch.int64)
    assert originals.matching(group, of_token[:0], expert).shape == (0, 4)
    originals.keep(group, of_token[:0], expert)
    expert.tokens = torch.tensor([2])
    assert torch.equal(originals.matching(group, of_token[2:3], expert), of_token[2:3])


def test_layers_that_see_every_token_are_matched_as_they_are():
    originals, inputs = OriginalInputs(), torch.randn(2, 3, 4)
    originals.keep(("q_proj",), inputs, None)
    assert originals.matching(("q_proj",), torch.zeros(2, 3, 4), None) is inputs


def test_statistics_of_few_tokens_are_topped_up_by_the_average_over_all_experts():
    k = 8
    wanted = tokens_wanted(k)
    rows = {("a",): torch.randn(3 * wanted, k), ("b",): torch.randn(wanted // 4, k), ("c",): torch.zeros(0, k)}
    errors = {group: torch.randn_like(inputs) for group, inputs in rows.items()}

    def statistics(group):
        inputs, count = rows[group], max(len(rows[group]), 1)
        hessian, cross = inputs.t() @ inputs / count, inputs.t() @ (inputs + errors[group]) / count
        return {None: InputStatistics(hessian, cross, len(inputs))}

    found = {group: statistics(group) for group in rows} | {("router",): {None: InputStatistics(torch.ones(k, k), None, 1)}}
    block = Block("block", nn.Identity(), {}, (), {name: make_expert([]) for name in "abc"})
    top_up(block, found)
    every = torch.cat(list(rows.values()))
    average = every.t() @ every / len(every)
    cross = every.t() @ torch.cat([rows[group] + errors[group] for group in rows]) / len(every)
    own = statistics(("b",))[None]
    torch.testing.assert_close(found[("a",)][None].hessian, statistics(("a",))[None].hessian)
    torch.testing.assert_close(found[("b",)][None].hessian, own.hessian / 4 + average * 3 / 4)
    torch.testing.assert_close(found[("b",)][None].cross, own.cross / 4 + cross * 3 / 4)
    torch.testing.assert_close(found[("c",)][None].hessian, average)
    torch.testing.assert_close(found[("c",)][None].cross, cross)
    assert [found[group][None].num_tokens for group in rows] == [3 * wanted, wanted // 4, 0]
    assert torch.equal(found[("router",)][None].hessian, torch.ones(k, k))


def test_steps_are_cut_where_their_statistics_would_take_too_much_memory():
    linears = {str(index): nn.Linear(8, 4) for index in range(6)}
    block = Block("block", nn.Identity(), linears)
    steps = [[("0",)], [("1",), ("2",), ("3",)], [("4",), ("5",)]]
    size = 3 * 4 * 8 * 8
    assert steps_in_memory(block, steps, 3) == steps
    assert steps_in_memory(block, steps, 3, 2 * size) == [[("0",)], [("1",), ("2",)], [("3",)], [("4",), ("5",)]]
    # A group that is too large alone still has its step.
    assert steps_in_memory(block, steps, 3, size - 1) == [[(name,)] for name in linears]
