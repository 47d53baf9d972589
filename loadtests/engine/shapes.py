"""Architectures to measure: the sizes alone, as weights are random."""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Shape:
    """A model of Llama's architecture."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int

    def hf_config(self) -> dict[str, Any]:
        """Hugging Face's config.json, without quantization."""
        return {
            "architectures": ["LlamaForCausalLM"], "model_type": "llama", "dtype": "bfloat16", "torch_dtype": "bfloat16",
            "hidden_size": self.hidden, "intermediate_size": self.intermediate, "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads, "num_key_value_heads": self.kv_heads, "head_dim": self.head_dim,
            "vocab_size": self.vocabulary, "max_position_embeddings": 131072, "rms_norm_eps": 1e-5, "hidden_act": "silu",
            "rope_theta": 500000.0, "tie_word_embeddings": False, "attention_bias": False, "mlp_bias": False,
            "bos_token_id": 0, "eos_token_id": 1,
        }  # fmt: skip

    def linear_layers(self) -> dict[str, tuple[int, int]]:
        """Name -> (outputs, inputs) of the linear layers of all blocks."""
        query, key = self.heads * self.head_dim, self.kv_heads * self.head_dim
        block = {
            "self_attn.q_proj": (query, self.hidden),
            "self_attn.k_proj": (key, self.hidden),
            "self_attn.v_proj": (key, self.hidden),
            "self_attn.o_proj": (self.hidden, query),
            "mlp.gate_proj": (self.intermediate, self.hidden),
            "mlp.up_proj": (self.intermediate, self.hidden),
            "mlp.down_proj": (self.hidden, self.intermediate),
        }
        return {f"model.layers.{index}.{name}": size for index in range(self.layers) for name, size in block.items()}


SHAPES = {
    "llama-8b": Shape(4096, 14336, 32, heads=32, kv_heads=8, head_dim=128, vocabulary=128256),
    "two-blocks": Shape(1024, 2816, 2, heads=16, kv_heads=4, head_dim=64, vocabulary=4096),
    "tiny": Shape(256, 512, 2, heads=4, kv_heads=2, head_dim=64, vocabulary=1024),
}
"""``llama-8b`` is Llama 3.1 8B; ``two-blocks`` is for load tests on a CPU, where its widths differ in time as on a GPU;
``tiny`` shows that the measurement works."""
