"""PrecisionState: which profile every request in flight reads, written out before each step."""

from collections.abc import Iterable, Sequence

import numpy as np
import numpy.typing as npt

from matgptq_vllm.core.precision import Catalogue
from matgptq_vllm.engine.step_buffers import StepBuffers


class PrecisionState:
    """Request id -> profile index, written into the buffers that the layers read.

    Args:
        catalogue: the profiles, in the order of their indices.
        buffers: those of the engine's layers.
    """

    def __init__(self, catalogue: Catalogue, buffers: StepBuffers):
        self._catalogue = catalogue
        self._buffers = buffers
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

    @property
    def num_requests(self) -> int:
        """Requests in flight, with those that ended in the last step, of which the next one tells."""
        return len(self._profile_of)

    def write_step(self, req_ids: Sequence[str], num_scheduled_tokens: npt.NDArray[np.int32]) -> None:
        """Write the profiles of the coming step.

        Args:
            req_ids: requests in the order of their rows in the batch; at least one.
            num_scheduled_tokens: int32 [len(req_ids)]: rows of each.
        """
        profiles = np.fromiter(map(self._profile_of.__getitem__, req_ids), dtype=np.int32, count=len(req_ids))
        self._buffers.write(profiles, num_scheduled_tokens)
        self.num_steps += 1
        np.add.at(self._num_tokens, profiles, num_scheduled_tokens)

    def reset_step(self) -> None:
        """Prepare a run that computes no request: its rows are not those of the last step."""
        self._buffers.reset()

    def tokens_by_profile(self) -> dict[str, int]:
        """Tokens computed so far, by profile name."""
        return dict(zip(self._catalogue.profiles, self._num_tokens.tolist(), strict=True))
