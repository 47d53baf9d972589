"""PrecisionState: which profile every request in flight reads, written out before each step."""

from collections.abc import Collection, Iterable, Mapping, Sequence

import numpy as np
import numpy.typing as npt

from matgptq_vllm.core.precision import Catalogue, uniform_name
from matgptq_vllm.engine.followers import Followers
from matgptq_vllm.engine.step_buffers import StepBuffers


class PrecisionState:
    """Request id -> profile index, written into the buffers that the layers read.

    Consecutive steps mostly have the same requests with the same number of rows. Such a step costs two comparisons and
    touches no device memory.

    Args:
        catalogue: the profiles, in the order of their indices.
        buffers: those of the engine's layers.
    """

    def __init__(self, catalogue: Catalogue, buffers: StepBuffers):
        self._catalogue = catalogue
        self._buffers = buffers
        self._profile_of: dict[str, int] = {}
        # Of the last batch: its requests in the order of their rows, and their profiles.
        self._req_ids: list[str] = []
        self._profiles = np.zeros(0, dtype=np.int32)
        # Of the last step written: rows of each request, and of each profile. None if the buffers hold something else.
        self._rows: npt.NDArray[np.int32] | None = None
        self._rows_by_profile = np.zeros(len(catalogue.profiles), dtype=np.int64)
        self.num_steps = 0
        self._num_tokens = np.zeros(len(catalogue.profiles), dtype=np.int64)
        self._followers = Followers()
        # Profile index -> the one that is read for it: another one only while its planes are dropped.
        self._read_as = list(range(len(catalogue.profiles)))

    def add_request(self, req_id: str, precision: object, group: str | None = None, num_prompt_tokens: int = 0) -> None:
        """Begin, or begin again after preemption, a request whose ``extra_args`` ask for ``precision`` (None: default).

        Args:
            group: whose level it follows once its prompt, of ``num_prompt_tokens``, is computed; None if it never changes.
        """
        profile = self._catalogue.index(precision)
        self._profile_of[req_id] = self._read_as[profile]
        if group is not None:
            self._followers.add(req_id, group, profile, num_prompt_tokens)
        self._forget_batch()

    def remove_requests(self, req_ids: Iterable[str]) -> None:
        """Forget requests that ended; unknown ids are ignored."""
        for req_id in req_ids:
            if self._profile_of.pop(req_id, None) is not None:
                self._forget_batch()
            self._followers.remove(req_id)

    @property
    def num_requests(self) -> int:
        """Requests in flight, with those that ended in the last step, of which the next one tells."""
        return len(self._profile_of)

    def follow(self, levels: Mapping[str, str | None]) -> None:
        """From now on the requests of these groups go to these profiles, each after its prompt; None: the group is over.

        Raises:
            InputError: a profile is not held; nothing is changed.
        """
        self._followers.set_levels(
            {group: None if level is None else self._catalogue.index(level) for group, level in levels.items()}
        )

    def advance(self, req_ids: Sequence[str], num_computed: Sequence[int], restarted: Collection[str] = ()) -> None:
        """Change the profiles of running requests that are due before the coming step.

        Args:
            req_ids: requests that the step computes and that ran before.
            num_computed: tokens of each whose keys and values are there before the step.
            restarted: those of them that were preempted and are computed from the start.
        """
        for req_id in restarted:
            self._profile_of[req_id] = self._read_as[self._followers.restart(req_id, self._profile_of[req_id])]
            self._forget_batch()
        for req_id, profile in self._followers.due(req_ids, num_computed):
            self._profile_of[req_id] = self._read_as[profile]
            self._forget_batch()

    def limit(self, max_width: int, widths: Mapping[str, int]) -> None:
        """From now on, read at most ``max_width``; to be called between steps.

        Requests admitted at a wider profile must have ended. What is left are those that went up while they ran, and what
        belongs to no request: wider profiles are read as the uniform one of ``max_width`` instead.

        Args:
            widths: profile -> widest width of any layer.
        """
        held = self._catalogue.within(max_width, widths)
        self._read_as = [
            self._catalogue.index(name if name in held.profiles else uniform_name(max_width))
            for name in self._catalogue.profiles
        ]
        for req_id, profile in self._profile_of.items():
            self._profile_of[req_id] = self._read_as[profile]
        self._buffers.change_default(self._catalogue.index(held.default))
        self._forget_batch()

    def common_profile(self, req_ids: list[str]) -> int | None:
        """Index of the profile that all of ``req_ids`` have; None if they differ or one was never added.

        Args:
            req_ids: requests of a step in any order; at least one.
        """
        profiles = set(map(self._profile_of.get, req_ids))
        return profiles.pop() if len(profiles) == 1 else None

    def write_step(self, req_ids: list[str], num_scheduled_tokens: npt.NDArray[np.int32]) -> None:
        """Write the profiles of the coming step.

        Args:
            req_ids: requests in the order of their rows in the batch; at least one.
            num_scheduled_tokens: int32 [len(req_ids)]: rows of each.
        """
        # Requests keep their id objects from step to step, so that equal lists compare by identity.
        if req_ids != self._req_ids:
            self._profiles = np.fromiter(map(self._profile_of.__getitem__, req_ids), dtype=np.int32, count=len(req_ids))
            self._req_ids = list(req_ids)
            self._rows = None
        if self._rows is None or not np.array_equal(num_scheduled_tokens, self._rows):
            self._buffers.write(self._profiles, num_scheduled_tokens)
            self._rows = num_scheduled_tokens.copy()
            rows = np.bincount(self._profiles, weights=num_scheduled_tokens, minlength=len(self._num_tokens))
            self._rows_by_profile = rows.astype(np.int64)
        self.num_steps += 1
        self._num_tokens += self._rows_by_profile

    def _forget_batch(self) -> None:
        self._req_ids = []
        self._rows = None

    def reset_step(self) -> None:
        """Prepare a run that computes no request: its rows are not those of the last step."""
        self._buffers.reset()
        self._rows = None

    def write_uniform_step(self, profile: int) -> None:
        """Prepare a run whose rows all have ``profile``, whatever their requests ask for; not counted as a step."""
        self._buffers.write(np.array([self._read_as[profile]], dtype=np.int32), np.ones(1, dtype=np.int32))
        self._rows = None

    def prepare_capture(self, profile: int | None) -> None:
        """Prepare the capture of a CUDA graph: for steps whose rows all have ``profile``, or, if None, for any step."""
        self._buffers.prepare_capture(profile)
        self._rows = None

    def tokens_by_profile(self) -> dict[str, int]:
        """Tokens computed so far, by profile name."""
        return dict(zip(self._catalogue.profiles, self._num_tokens.tolist(), strict=True))
