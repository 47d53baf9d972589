"""The terms of a step's time, as columns of a linear model: one for the step itself, three per profile, one for context, and
one for whether prompts are computed."""

import math
from collections.abc import Sequence

from serve.load import StepLoad

KINDS = ("fixed", "decode", "prefill")
"""Of cost per profile: reading its weights once per step, each decoded token, each prompt token."""

BASE = 0
"""Column of the step itself, 1 in every step."""


class StepColumns:
    """Which column is what.

    Args:
        profiles: narrow to wide.
    """

    def __init__(self, profiles: Sequence[str]) -> None:
        count = len(profiles)
        self._index = {name: index for index, name in enumerate(profiles)}
        self.first = {kind: 1 + number * count for number, kind in enumerate(KINDS)}
        """Kind -> column of the narrowest profile; the others follow."""

        self.context = 1 + len(KINDS) * count
        """Column of the context tokens."""

        self.prompts = self.context + 1
        """Column of steps that compute prompts, the last one."""

    def __len__(self) -> int:
        return self.prompts + 1

    def column(self, kind: str, profile: str) -> int:
        """Where the cost ``kind`` of ``profile`` is; KeyError if there is none."""
        return self.first[kind] + self._index[profile]

    def features(self, load: StepLoad) -> dict[int, float]:
        """Column -> value, zeros left out. KeyError: a profile that there is no column for."""
        features = {BASE: 1.0}
        fixed, decode, prefill = self.first.values()
        for name, tokens in load.tokens.items():
            if tokens > 0:
                index = self._index[name]
                features[decode + index] = float(tokens)
                features[fixed + index] = min(1.0, float(tokens))
        for name, tokens in load.prefill.items():
            if tokens > 0:
                index = self._index[name]
                features[prefill + index] = float(tokens)
                features[fixed + index] = min(1.0, features.get(fixed + index, 0.0) + float(tokens))
        prompt_tokens = sum(load.prefill.values())
        if prompt_tokens > 0:
            features[self.prompts] = min(1.0, float(prompt_tokens))
        if load.context_tokens > 0:
            features[self.context] = float(load.context_tokens)
        return features

    def mean_features(self, loads: Sequence[StepLoad]) -> dict[int, float]:
        """Column -> its mean over several steps, zeros left out."""
        total: dict[int, float] = {}
        for load in loads:
            for column, value in self.features(load).items():
                total[column] = total.get(column, 0.0) + value
        return {column: value / len(loads) for column, value in total.items()}

    def key(self, loads: Sequence[StepLoad]) -> tuple[int, int, int]:
        """What steps alike have in common: the profiles present, and powers of two of the mean decoded and prompt tokens."""
        presence, decoded, prompts = 0, 0.0, 0.0
        for load in loads:
            for name, tokens in (*load.tokens.items(), *load.prefill.items()):
                if tokens > 0:
                    presence |= 1 << self._index[name]
            decoded += sum(load.tokens.values())
            prompts += sum(load.prefill.values())
        return presence, _magnitude(decoded / len(loads)), _magnitude(prompts / len(loads))


def _magnitude(tokens: float) -> int:
    """0, then a bucket per power of two."""
    return 0 if tokens <= 0 else 1 + max(0, math.ceil(math.log2(max(1.0, tokens))))
