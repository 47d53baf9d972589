"""How many calibration tokens each expert of a parent saw, from its calibration log, and whether they were enough.

A layer of an expert has two numbers in the log, ``tokens`` and ``tokens_wanted``; other layers have ``tokens`` alone. Below
what was wanted, the layer was rounded by the average over all experts too (``calibrate.few_tokens``). Standard library only.
"""

from collections.abc import Mapping
from typing import Any

TOKENS, TOKENS_WANTED = "tokens", "tokens_wanted"


def expert_tokens(layers: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, int]]:
    """Layer -> its two numbers, of every layer that is an expert's.

    Args:
        layers: the log's entries by layer.
    """
    return {
        name: {key: int(layer[key]) for key in (TOKENS, TOKENS_WANTED)}
        for name, layer in layers.items()
        if TOKENS_WANTED in layer
    }


def expert_lines(tokens: Mapping[str, Mapping[str, int]]) -> list[str]:
    """The experts that saw too few tokens, for a terminal, the poorest first; nothing for a model without experts."""
    if not tokens:
        return []
    experts: dict[str, tuple[int, int]] = {}
    for layer, counts in tokens.items():
        expert = layer.rpartition(".")[0]
        wanted = max(counts[TOKENS_WANTED], experts.get(expert, (0, 0))[1])
        experts[expert] = counts[TOKENS], wanted
    few = sorted((seen, expert, wanted) for expert, (seen, wanted) in experts.items() if seen < wanted)
    title = f"{len(experts)} experts; each saw as many calibration tokens as wanted"
    if few:
        title = (
            f"{len(experts)} experts; {len(few)} saw fewer calibration tokens than wanted and are rounded by the average over "
            "all experts too"
        )
    return ["", title, *(f"  {expert}  {seen:,} of {wanted:,} tokens" for seen, expert, wanted in few)]
