"""StepBuffers: what every layer reads of a step, at addresses that never change, because CUDA graphs read them."""

import numpy as np
import numpy.typing as npt
import torch


class StepBuffers:
    """The profile of every row of the coming step, and the rows sorted by it (see ``kernels.segments``).

    To begin with, and after ``reset``, all rows have the default profile. Nothing is copied while the profile stays one.

    Args:
        max_tokens: rows of the largest step, padding included.
        max_profiles: profiles there may be; at most 256.
        default: profile index.
        device: the engine's.
    """

    def __init__(self, max_tokens: int, max_profiles: int, default: int, device: torch.device):
        self.token_profiles = torch.full((max_tokens,), default, dtype=torch.int32, device=device)
        """int32 [max_tokens], on the device."""
        self.row_order = torch.arange(max_tokens, dtype=torch.int32, device=device)
        """int32 [max_tokens], on the device: always a permutation."""
        self.step_profiles = torch.zeros(max_profiles, dtype=torch.int32, device="cpu")
        """int32 [max_profiles], on the CPU: rows of each profile. All rows there can be, if they have one profile."""
        self._counts = self.step_profiles.numpy()
        self._counts[default] = max_tokens
        self._default = default
        self._only: int | None = default  # the profile of all rows
        self._num_sorted = 0  # rows at the head of row_order that may not be at their own place

    def reset(self) -> None:
        """Make every row the default profile's: for runs without requests, whose rows are fewer than the last step's."""
        self._write_one(self._default)

    def write(self, profiles: npt.NDArray[np.int32], num_tokens: npt.NDArray[np.int32]) -> None:
        """Write the coming step. Nothing waits for the device.

        Args:
            profiles: int32 [requests]: profile index of each request, in the order of their rows; at least one.
            num_tokens: int32 [requests]: rows of each.
        """
        if (profiles == profiles[0]).all():
            self._write_one(int(profiles[0]))
        else:
            self._write_several(profiles, num_tokens)

    def _write_one(self, profile: int) -> None:
        if self._only == profile:
            return
        self.token_profiles.fill_(profile)
        self._unsort_from(0)
        self._counts[:] = 0
        self._counts[profile] = self.token_profiles.shape[0]
        self._only = profile

    def _write_several(self, profiles: npt.NDArray[np.int32], num_tokens: npt.NDArray[np.int32]) -> None:
        per_token = np.repeat(profiles, num_tokens)
        # Of one byte each, so that numpy sorts them by counting.
        order = per_token.astype(np.uint8).argsort(kind="stable")
        total = len(per_token)
        self._copy(per_token, self.token_profiles)
        # Padding: the profile of the last row in order, so that it is in order too and adds no width.
        self.token_profiles[total:].fill_(int(per_token[order[-1]]))
        self._unsort_from(total)
        self._copy(order.astype(np.int32), self.row_order)
        self._num_sorted = total
        self._counts[:] = np.bincount(profiles, weights=num_tokens, minlength=len(self._counts))
        self._only = None

    def _unsort_from(self, start: int) -> None:
        if start < self._num_sorted:
            torch.arange(start, self._num_sorted, out=self.row_order[start : self._num_sorted])
        self._num_sorted = min(start, self._num_sorted)

    @staticmethod
    def _copy(source: npt.NDArray[np.int32], target: torch.Tensor) -> None:
        host = torch.from_numpy(source)
        if target.is_cuda:
            # From pinned memory the copy joins the stream without a synchronisation; steps may overlap, so each has its own.
            host = host.pin_memory()
        target[: len(source)].copy_(host, non_blocking=True)
