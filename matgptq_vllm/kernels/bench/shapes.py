"""Matrix products of one decoder block of real models, as a server runs them: q, k and v fused, gate and up fused."""

from dataclasses import dataclass


@dataclass(frozen=True)
class GemmShape:
    """y[M, n] = x[M, k] @ W[n, k].T for one linear layer."""

    layer: str
    n: int
    k: int

    @property
    def num_weights(self) -> int:
        return self.n * self.k


@dataclass(frozen=True)
class BlockDims:
    """What a model's config.json says of one block."""

    hidden: int
    heads: int
    kv_heads: int
    intermediate: int
    head_dim: int = 128

    def shapes(self) -> tuple[GemmShape, ...]:
        """The block's four products, in the order in which they run."""
        attention = self.heads * self.head_dim
        return (
            GemmShape("qkv", attention + 2 * self.kv_heads * self.head_dim, self.hidden),
            GemmShape("o", self.hidden, attention),
            GemmShape("gate_up", 2 * self.intermediate, self.hidden),
            GemmShape("down", self.hidden, self.intermediate),
        )


MODELS: dict[str, tuple[GemmShape, ...]] = {
    "llama-3.1-8b": BlockDims(4096, 32, 8, 14336).shapes(),
    "llama-3.1-70b": BlockDims(8192, 64, 8, 28672).shapes(),
    "qwen3-8b": BlockDims(4096, 32, 8, 12288).shapes(),
    "qwen3-14b": BlockDims(5120, 40, 8, 17408).shapes(),
    "qwen3-32b": BlockDims(5120, 64, 8, 25600).shapes(),
}
"""Name of a model on the command line: its products."""
