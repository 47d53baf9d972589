"""StepBuffers: what every layer reads of a step, at addresses that never change, because CUDA graphs read them."""

import numpy as np
import numpy.typing as npt
import torch

ANY_PROFILE = -1
"""Index that no profile has: rows may have any."""


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
        self.graph_profile = torch.full((1,), ANY_PROFILE, dtype=torch.int32, device="cpu")
        """int32 [1], on the CPU: while a CUDA graph is captured for steps whose rows all have one profile, its index;
        otherwise ANY_PROFILE."""
        self._counts = self.step_profiles.numpy()
        self._counts[default] = max_tokens
        self._default = default
        self._only: int | None = default  # the profile of all rows
        self._num_sorted = 0  # rows at the head of row_order that may not be at their own place

    def change_default(self, default: int) -> None:
        """Make every row, now and after every ``reset``, that profile's."""
        self._default = default
        self.reset()

    def reset(self) -> None:
        """Make every row the default profile's: for runs without requests, whose rows are fewer than the last step's."""
        self.prepare_capture(None)

    def prepare_capture(self, profile: int | None) -> None:
        """Until the next call, or ``reset``, what is launched is captured and replayed for rows of ``profile`` only; of any,
        if None."""
        self.graph_profile.fill_(ANY_PROFILE if profile is None else profile)
        self._write_one(self._default if profile is None else profile)

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
        staging = torch.empty(2, total, dtype=torch.int32, pin_memory=self.token_profiles.is_cuda)
        host = staging.numpy()
        host[0], host[1] = per_token, order
        # From pinned memory a copy joins the stream without a synchronisation. Steps may overlap, so each has memory of its
        # own, which PyTorch gives to no later step before the copies are done.
        self.token_profiles[:total].copy_(staging[0], non_blocking=True)
        # Padding: the profile of the last row in order, so that it is in order too and adds no width.
        self.token_profiles[total:].fill_(int(per_token[order[-1]]))
        self._unsort_from(total)
        self.row_order[:total].copy_(staging[1], non_blocking=True)
        self._num_sorted = total
        self._counts[:] = np.bincount(profiles, weights=num_tokens, minlength=len(self._counts))
        self._only = None

    def _unsort_from(self, start: int) -> None:
        if start < self._num_sorted:
            torch.arange(start, self._num_sorted, out=self.row_order[start : self._num_sorted])
        self._num_sorted = min(start, self._num_sorted)
