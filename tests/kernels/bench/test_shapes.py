import pytest

from matgptq_vllm.kernels.bench.shapes import MODELS, BlockDims, GemmShape

PER_BLOCK = {
    # Weights of q, k, v, o, gate, up and down of the published configurations, worked out by hand.
    "llama-3.1-8b": 218_103_808,
    "llama-3.1-70b": 855_638_016,
    "qwen3-8b": 192_937_984,
    "qwen3-14b": 330_301_440,
    "qwen3-32b": 487_587_840,
}


@pytest.mark.parametrize("model", MODELS)
def test_a_block_has_as_many_weights_as_the_real_model(model: str):
    assert sum(shape.num_weights for shape in MODELS[model]) == PER_BLOCK[model]
    assert [shape.layer for shape in MODELS[model]] == ["qkv", "o", "gate_up", "down"]


def test_the_shapes_of_the_anchors():
    assert MODELS["llama-3.1-8b"] == (
        GemmShape("qkv", 6144, 4096),
        GemmShape("o", 4096, 4096),
        GemmShape("gate_up", 28672, 4096),
        GemmShape("down", 4096, 14336),
    )


def test_attention_may_be_wider_than_the_hidden_size():
    qkv, o, gate_up, down = BlockDims(hidden=64, heads=8, kv_heads=2, intermediate=96, head_dim=16).shapes()
    assert ((qkv.n, qkv.k), (o.n, o.k)) == ((192, 64), (64, 128))
    assert ((gate_up.n, gate_up.k), (down.n, down.k)) == ((192, 64), (64, 96))
