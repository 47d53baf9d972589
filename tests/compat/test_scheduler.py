"""compat.scheduler: which precision a request gets before vLLM's scheduler sees it."""

from types import SimpleNamespace

import pytest

from matgptq_vllm.compat.scheduler import _PrecisionScheduling
from matgptq_vllm.core.precision import XARGS_KEY, Catalogue


class Scheduler:
    """As much of vLLM's as receives a request."""

    def __init__(self) -> None:
        self.added: list[SimpleNamespace] = []

    def add_request(self, request: SimpleNamespace) -> None:
        self.added.append(request)


class PrecisionScheduler(_PrecisionScheduling, Scheduler):
    def __init__(self) -> None:
        Scheduler.__init__(self)
        self._all_profiles = self._catalogue = Catalogue(("2", "4", "8"), "8")
        self._refused, self._token = {}, None


def request(extra_args: dict | None, salt: str | None) -> SimpleNamespace:
    return SimpleNamespace(
        request_id="r", client_index=0, cache_salt=salt, sampling_params=SimpleNamespace(extra_args=extra_args),
        pooling_params=None, block_hashes=["old"], update_block_hashes=lambda: None,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("extra_args", "salt", "profile"),
    [
        (None, None, "8"),
        ({XARGS_KEY: "4"}, None, "4"),
        (None, "precision=4", "4"),
        ({"other": 1}, "precision=2|mine", "2"),
        # What the parameters say counts, and the HTTP middleware always makes them say something.
        ({XARGS_KEY: "4"}, "precision=8", "4"),
        (None, "mine", "8"),
    ],
)
def test_the_parameters_decide_and_the_salt_where_they_are_silent(extra_args, salt, profile) -> None:
    scheduler, asked = PrecisionScheduler(), request(extra_args, salt)
    params = asked.sampling_params
    scheduler.add_request(asked)
    (added,) = scheduler.added
    assert added.cache_salt == f"{salt or ''}|precision={profile}"
    assert added.block_hashes == []
    assert (added.sampling_params.extra_args or {}).get(XARGS_KEY, "8") == profile
    # Other beams may have the same parameters.
    assert params.extra_args == extra_args


def test_a_salt_that_names_an_unknown_precision_is_refused() -> None:
    scheduler = PrecisionScheduler()
    scheduler.add_request(request(None, "precision=5"))
    assert scheduler.added == []
    assert "'5'" in scheduler._refused["r"][1]
