import pytest
import torch

from calibrate.first_inputs import capture_first_inputs
from calibrate.model import find_blocks, load_config, skeleton
from calibrate.resident_block import ResidentBlock
from calibrate.weights_source import SafetensorsSource

CPU = torch.device("cpu")


@pytest.fixture
def block_inputs(llama_dir):
    """A block, its source, and one batch for it: hidden states and other arguments."""
    model = skeleton(load_config(llama_dir))
    source = SafetensorsSource(llama_dir, model)
    blocks = find_blocks(model)
    windows = torch.arange(44).view(2, 22)
    first = capture_first_inputs(model, blocks, source, [windows], torch.float32)
    return blocks[0], source, first.hidden[0], first.calls[0][2]


def test_each_stream_has_its_own_weights(block_inputs):
    block, source, hidden, call = block_inputs
    with ResidentBlock(block, CPU, torch.float32, (3, 4)) as resident:
        resident.load(source)
        original = resident.run(None, hidden, call)
        assert torch.equal(resident.run(3, hidden, call), original)
        name = "model.layers.0.mlp.down_proj"
        resident.set_values(3, name, torch.zeros(40, 72))
        changed = resident.run(3, hidden, call)
        assert not torch.equal(changed, original)
        for stream in (4, None):
            assert torch.equal(resident.run(stream, hidden, call), original)
        assert torch.equal(resident.run(3, hidden, call), changed)


def test_original_weights_keep_their_stored_type_whatever_the_block_computes_in(block_inputs):
    block, source, hidden, call = block_inputs
    with ResidentBlock(block, CPU, torch.float32, ()) as resident:
        resident.load(source)
        assert {weight.dtype for weight in resident.stored.values()} == {torch.bfloat16}
        assert resident.run(None, hidden, call).dtype == torch.float32
    assert resident.stored == {}
    narrow = {**call, "position_embeddings": tuple(part.bfloat16() for part in call["position_embeddings"])}
    with ResidentBlock(block, CPU, torch.bfloat16, ()) as resident:
        resident.load(source)
        assert resident.run(None, hidden.bfloat16(), narrow).dtype == torch.bfloat16
