import pytest
import torch
from torch import nn

from calibrate.first_inputs import capture_first_inputs
from calibrate.model import find_blocks, load_config, load_model, skeleton
from calibrate.resident_block import ResidentBlock
from calibrate.weights_source import SafetensorsSource
from matgptq_vllm.core.errors import UnsupportedError

CPU = torch.device("cpu")


class NotedSource:
    """A source that notes what is read from it."""

    def __init__(self, source: SafetensorsSource):
        self._source = source
        self.names: list[str] = []

    def read(self, name: str) -> torch.Tensor:
        self.names.append(name)
        return self._source.read(name)


def tokens(num_windows: int, seq_len: int) -> torch.Tensor:
    return torch.randint(0, 256, (num_windows, seq_len), generator=torch.Generator().manual_seed(0))


def test_running_the_blocks_one_by_one_is_the_model(family_dir):
    windows = tokens(8, 33)
    expected = load_model(family_dir, torch.float32)(windows, output_hidden_states=True).hidden_states[-1]
    model = skeleton(load_config(family_dir))
    source = SafetensorsSource(family_dir, model)
    blocks = find_blocks(model)
    first = capture_first_inputs(model, blocks, source, windows.split(3), torch.float32)
    assert [tuple(hidden.shape) for hidden in first.hidden] == [(3, 33, 40), (3, 33, 40), (2, 33, 40)]
    assert [call.keys() for call in first.calls] == [{3, 2}, {3, 2}]
    hidden = first.hidden
    for block, calls in zip(blocks, first.calls, strict=True):
        with ResidentBlock(block, CPU, torch.float32, ()) as resident:
            resident.load(source)
            hidden = [resident.run(None, states, calls[len(states)]) for states in hidden]
        assert {parameter.device.type for parameter in block.module.parameters()} == {"meta"}
    norm = model.model.norm
    norm.weight = nn.Parameter(source.read("model.norm.weight").float())
    torch.testing.assert_close(norm(torch.cat(hidden)), expected, rtol=1e-4, atol=1e-4)


def test_only_what_runs_before_the_blocks_is_read_and_nothing_of_it_stays(llama_dir):
    model = skeleton(load_config(llama_dir))
    source = NotedSource(SafetensorsSource(llama_dir, model))
    before = dict(model.named_parameters())
    first = capture_first_inputs(model, find_blocks(model), source, tokens(4, 10).split(2), torch.bfloat16)
    assert source.names == ["model.embed_tokens.weight"]
    assert first.hidden[0].dtype == torch.bfloat16
    after = dict(model.named_parameters())
    assert all(after[name] is before[name] for name in before)


def test_a_model_whose_blocks_are_told_about_the_text_is_refused(llama_dir):
    model = skeleton(load_config(llama_dir))
    rotary = model.model.rotary_emb.forward
    model.model.rotary_emb.forward = lambda states, position_ids: (*rotary(states, position_ids), states)
    with pytest.raises(UnsupportedError, match=r"model\.layers\.0: LlamaDecoderLayer is called with arguments that depend"):
        capture_first_inputs(
            model, find_blocks(model), SafetensorsSource(llama_dir, model), tokens(4, 10).split(2), torch.float32
        )
