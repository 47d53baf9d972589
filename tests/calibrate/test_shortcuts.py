import pytest
import torch

from calibrate.first_inputs import capture_first_inputs
from calibrate.model import find_blocks, load_config, skeleton
from calibrate.resident_block import ResidentBlock
from calibrate.shortcuts import Shortcuts, noted_ends
from calibrate.weights_source import SafetensorsSource

CPU = torch.device("cpu")
O_PROJ, DOWN_PROJ = "model.layers.0.self_attn.o_proj", "model.layers.0.mlp.down_proj"


@pytest.fixture
def running(family_dir):
    """The first block of a model, loaded, the end of each of its children, and a function that runs it in a stream."""
    model = skeleton(load_config(family_dir))
    source = SafetensorsSource(family_dir, model)
    blocks = find_blocks(model)
    first = capture_first_inputs(model, blocks, source, [torch.arange(44).view(2, 22)], torch.float32)
    with ResidentBlock(blocks[0], CPU, torch.float32, (3,)) as resident:
        resident.load(source)

        def run(stream):
            return resident.run(stream, first.hidden[0], first.calls[0][2])

        with noted_ends(resident.block) as ends:
            run(None)
        yield resident, ends, run


def test_attention_and_mlp_end_in_their_last_layers(running):
    resident, ends, _ = running
    children = dict(resident.block.module.named_children())
    assert {name: end.child for name, end in ends.items()} == {O_PROJ: children["self_attn"], DOWN_PROJ: children["mlp"]}


def test_a_shortcut_gives_the_same_bits_with_the_weights_of_the_moment(running):
    resident, ends, run = running
    inputs = {}
    hooks = [
        resident.block.linears[name].register_forward_pre_hook(lambda _, args, name=name: inputs.setdefault(name, args[0]))
        for name in ends
    ]
    run(3)
    for hook in hooks:
        hook.remove()
    resident.set_values(3, O_PROJ, resident.stored[O_PROJ].float() * 0.5)
    expected = run(3)
    shortcuts = Shortcuts(resident.block, ends)
    shortcuts.keep(3, 0, O_PROJ, inputs[O_PROJ])
    called = []
    query = resident.block.linears["model.layers.0.self_attn.q_proj"]
    hook = query.register_forward_pre_hook(lambda *_: called.append("q_proj"))
    with shortcuts.taken(3, 0):
        assert torch.equal(run(3), expected)
    assert called == []
    for stream, batch in ((3, 1), (None, 0)):
        with shortcuts.taken(stream, batch):
            run(stream)
    assert called == ["q_proj", "q_proj"]
    hook.remove()
    assert torch.equal(run(3), expected)


def test_inputs_beyond_the_budget_and_those_of_other_layers_are_not_kept(running):
    resident, ends, run = running
    shortcuts = Shortcuts(resident.block, ends, budget_bytes=100)
    shortcuts.keep(3, 0, O_PROJ, torch.zeros(26))
    shortcuts.keep(3, 0, "model.layers.0.self_attn.q_proj", torch.zeros(2))
    expected = run(3)
    with shortcuts.taken(3, 0):
        assert torch.equal(run(3), expected)
