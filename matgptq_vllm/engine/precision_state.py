"""PrecisionState: which profile every request in flight reads, written out per token before each step."""

from collections.abc import Iterable, Sequence

import numpy as np
import numpy.typing as npt
import torch

from matgptq_vllm.core.precision import Catalogue


class PrecisionState:
    """Request id -> profile index, and the per-token buffer that the layers read.

    Args:
        catalogue: the profiles, in the order of their indices.
        token_profiles: int32 [max tokens per step] on the engine's device; must never be reallocated.
    """

    def __init__(self, catalogue: Catalogue, token_profiles: torch.Tensor):
        self._catalogue = catalogue
        self._token_profiles = token_profiles
        self._profile_of: dict[str, int] = {}
        self.num_steps = 0
        self._num_tokens = np.zeros(len(catalogue.profiles), dtype=np.int64)

    def add_request(self, req_id: str, precision: object) -> None:
        """Begin, or begin again after preemption, a request whose ``extra_args`` ask for ``precision`` (None: default)."""
        self._profile_of[req_id] = self._catalogue.index(precision)

    def remove_requests(self, req_ids: Iterable[str]) -> None:
        """Forget requests that ended; unknown ids are ignored."""
        for req_id in req_ids:
            self._profile_of.pop(req_id, None)

    def write_step(self, req_ids: Sequence[str], num_scheduled_tokens: npt.NDArray[np.int32]) -> None:
        """Write the profile of every token of the coming step.

        Rows beyond the step's tokens keep old values: valid indices, read only for padding.

        Args:
            req_ids: requests in the order of their rows in the batch.
            num_scheduled_tokens: int32 [len(req_ids)]: rows of each.
        """
        per_request = np.fromiter((self._profile_of[req_id] for req_id in req_ids), dtype=np.int32, count=len(req_ids))
        per_token = torch.from_numpy(np.repeat(per_request, num_scheduled_tokens))
        if self._token_profiles.is_cuda:
            # From pinned memory the copy joins the stream without a synchronisation; steps may overlap, so each has its own.
            per_token = per_token.pin_memory()
        self._token_profiles[: per_token.shape[0]].copy_(per_token, non_blocking=True)
        self.num_steps += 1
        np.add.at(self._num_tokens, per_request, num_scheduled_tokens)

    def tokens_by_profile(self) -> dict[str, int]:
        """Tokens computed so far, by profile name."""
        return dict(zip(self._catalogue.profiles, self._num_tokens.tolist(), strict=True))
