"""Experts of a mixture, one by one: the form that checkpoints have, where transformers fuses all into two tensors.

    transformers                            a checkpoint (Qwen3-MoE)           a checkpoint (Mixtral)
    mlp.experts.gate_up_proj [E, 2I, H]     mlp.experts.3.gate_proj [I, H]     block_sparse_moe.experts.3.w1 [I, H]
                                            mlp.experts.3.up_proj   [I, H]     block_sparse_moe.experts.3.w3 [I, H]
    mlp.experts.down_proj    [E, H, I]      mlp.experts.3.down_proj [H, I]     block_sparse_moe.experts.3.w2 [H, I]

with E experts, hidden size H and I inner values per expert. After ``separate_experts`` a model has the modules, and so the
names, of the checkpoint; each expert's layers are ``nn.Linear`` and are called with the tokens routed to it.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_checkpoint_conversion_mapping

GATE_UP, DOWN = "gate_up_proj", "down_proj"
"""The fused tensors of transformers."""


@dataclass(frozen=True)
class ExpertNames:
    """What a checkpoint calls the parts of a mixture."""

    gate: str
    up: str
    down: str
    container: tuple[str, str] | None
    """The module that holds router and experts: its name in transformers, and in the checkpoint where that differs."""


class Expert(nn.Module):
    """One expert: ``down(gating(gate(x), up(x)))``.

    Args:
        gate, up: float weights [I, H]; down: [H, I]. Layers share their memory.
        names: what the three layers are called.
        gating: [tokens, 2I] -> [tokens, I].
    """

    def __init__(
        self,
        gate: torch.Tensor,
        up: torch.Tensor,
        down: torch.Tensor,
        names: ExpertNames,
        gating: Callable[[torch.Tensor], torch.Tensor],
    ):
        super().__init__()
        self._names = names
        self._gating = gating
        for name, weight in ((names.gate, gate), (names.up, up), (names.down, down)):
            self.add_module(name, _linear(weight))
        self.tokens = torch.empty(0, dtype=torch.int64)
        """int64 [tokens], ascending: the tokens of the last forward pass that were routed here."""

    @property
    def layers(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """Names of the layers that see the expert's inputs, and of the one that sees its inner values."""
        return (self._names.gate, self._names.up), (self._names.down,)

    def forward(self, hidden: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        """Outputs [tokens, H] for the inputs ``hidden`` [tokens, H] of these ``tokens``."""
        self.tokens = tokens
        gate, up = self.get_submodule(self._names.gate), self.get_submodule(self._names.up)
        inner = self._gating(torch.cat([gate(hidden), up(hidden)], dim=-1))
        return self.get_submodule(self._names.down)(inner)


class Experts(nn.Module):
    """All experts of a mixture. Takes the place of the fused module, whose arguments its forward pass has.

    Every expert is called in every pass, those without a token with none, so that what a pass calls does not depend on
    the text.
    """

    def __init__(self, fused: nn.Module, names: ExpertNames):
        super().__init__()
        gate_up, down = fused.get_parameter(GATE_UP).detach(), fused.get_parameter(DOWN).detach()
        gating: Any = fused._apply_gate
        # Held by the gating function, which may need its settings.
        del fused.gate_up_proj, fused.down_proj
        for index in range(len(gate_up)):
            gate, up = gate_up[index].chunk(2)
            self.add_module(str(index), Expert(gate, up, down[index], names, gating))

    @property
    def num_experts(self) -> int:
        """How many there are."""
        return len(self._modules)

    def forward(self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor) -> torch.Tensor:
        """Outputs [tokens, H] for inputs likewise, the indices (int64) of their experts [tokens, k] and weights likewise."""
        chosen = top_k_index.reshape(-1)
        order = chosen.argsort(stable=True)  # by expert, then by token
        counts = chosen.bincount(minlength=self.num_experts).tolist()
        weights = top_k_weights.reshape(-1, 1)
        result = torch.zeros_like(hidden_states)
        for expert, places in zip(self.children(), order.split(counts), strict=True):
            tokens = places // top_k_index.shape[-1]
            outputs = expert(hidden_states[tokens], tokens) * weights[places]
            result.index_add_(0, tokens, outputs.to(result.dtype))
        return result


def separate_experts(model: PreTrainedModel) -> None:
    """Give ``model`` the experts of its checkpoint, in place; their weights are views of the fused ones.

    Experts of another form (transposed, interleaved, with biases, or renamed in a way unknown here) stay as they are.
    """
    names = expert_names(model.config.get_text_config().model_type)
    if names is None:
        return
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if _is_fused(child):
                setattr(module, name, Experts(child, names))
    if names.container is not None:
        for module in list(model.modules()):
            _rename_container(module, *names.container)


def expert_names(model_type: str) -> ExpertNames | None:
    """What the checkpoints of ``model_type`` call the parts of their mixtures; None without separate experts.

    Read off the conversions that transformers applies on loading.
    """
    found: dict[str, str] = {}
    container = None
    for conversion in get_checkpoint_conversion_mapping(model_type) or []:
        sources, (target, *_) = conversion.source_patterns, conversion.target_patterns
        operations = [(type(operation).__name__, operation.dim) for operation in getattr(conversion, "operations", [])]
        leaves = [re.fullmatch(r"(?:mlp)?\.experts\.\*\.(\w+)\.weight", source) for source in sources]
        renamed = [re.fullmatch(r"\.(\w+)\.", pattern) for pattern in (sources[0], target)]
        if target.endswith(f".experts.{GATE_UP}") and operations == [("MergeModulelist", 0), ("Concatenate", 1)]:
            found.update(zip(("gate", "up"), (leaf[1] for leaf in leaves if leaf), strict=False))
        elif target.endswith(f".experts.{DOWN}") and operations == [("MergeModulelist", 0)]:
            found.update(down=leaves[0][1] if leaves[0] else "")
        elif not operations and renamed[0] and renamed[1] and container is None:
            container = (renamed[1][1], renamed[0][1])
        else:
            return None
    return ExpertNames(**found, container=container) if len(found) == 3 and all(found.values()) else None


def mixtures(module: nn.Module, prefix: str) -> list[tuple[str, nn.Module, Experts]]:
    """Every mixture in ``module``, which lies at ``prefix``: path of its experts, the module that holds them, and they."""
    return [
        (f"{path}.{name}", holder, child)
        for path, holder in module.named_modules(prefix=prefix)
        for name, child in holder.named_children()
        if isinstance(child, Experts)
    ]


def routers(holder: nn.Module, experts: Experts) -> set[nn.Module]:
    """The modules beside ``experts`` that decide how much each expert says: they stay as they are.

    They are small, and a token that they send elsewhere costs more than any of their bits.
    """
    return {
        child
        for child in holder.children()
        if isinstance(child, nn.Linear)
        or any(parameter.shape[0] == experts.num_experts for parameter in child.parameters(recurse=False))
    }


def _is_fused(module: nn.Module) -> bool:
    shapes = {name: tuple(parameter.shape) for name, parameter in module.named_parameters()}
    if shapes.keys() != {GATE_UP, DOWN} or any(len(shape) != 3 for shape in shapes.values()):
        return False
    (num_experts, inner, hidden), down = shapes[GATE_UP], shapes[DOWN]
    form = [getattr(module, name, None) for name in ("has_gate", "is_concatenated", "is_transposed", "has_bias")]
    return form == [True, True, False, False] and down == (num_experts, hidden, inner // 2) and inner % 2 == 0


def _linear(weight: torch.Tensor) -> nn.Linear:
    """A layer with the weights ``weight`` [N, K] itself, not a copy."""
    n, k = weight.shape
    linear = nn.Linear(k, n, bias=False, device="meta")
    linear.weight = nn.Parameter(weight, requires_grad=False)
    return linear


def _rename_container(module: nn.Module, ours: str, stored: str) -> None:
    """Let the child ``ours`` of ``module`` be called ``stored``, if it is a mixture; its forward pass finds it as before."""
    child = module._modules.get(ours)
    if child is None or not any(isinstance(part, Experts) for part in child.children()):
        return
    module._modules = {stored if name == ours else name: part for name, part in module._modules.items()}
    # A plain attribute: found by name, but neither a parameter nor a module of its own.
    object.__setattr__(module, ours, child)
