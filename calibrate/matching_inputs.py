"""The original model's inputs of the same tokens, where routing may have sent an expert other tokens."""

import torch

from calibrate.experts import Expert
from calibrate.input_groups import Group


class OriginalInputs:
    """The original's inputs of each group in the batch at hand, to compare those of the other streams with."""

    def __init__(self) -> None:
        self._inputs: dict[Group, torch.Tensor] = {}
        self._tokens: dict[Group, torch.Tensor] = {}

    def keep(self, group: Group, inputs: torch.Tensor, expert: Expert | None) -> None:
        """Keep ``inputs``, floating [..., K], which are the original's.

        Args:
            expert: the one that the layers of the group belong to, just called; None for layers that see every token.
        """
        self._inputs[group] = inputs
        if expert is not None:
            self._tokens[group] = expert.tokens

    def matching(self, group: Group, inputs: torch.Tensor, expert: Expert | None) -> torch.Tensor:
        """The original's inputs of the tokens that ``inputs`` belong to, in their order and shape.

        A token that the original sends to other experts stands for itself: it tells the layer of no error to make up for.
        """
        original = self._inputs[group]
        if expert is None:
            return original
        known = self._tokens[group]
        if not len(known):
            return inputs
        places = torch.searchsorted(known, expert.tokens).clamp_max(len(known) - 1)
        return torch.where((known[places] == expert.tokens)[:, None], original[places], inputs)
