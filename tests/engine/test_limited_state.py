"""engine.precision_state: while planes are dropped, no step has a profile that needs them."""

import numpy as np
import pytest
import torch

from matgptq_vllm.core.precision import Catalogue
from matgptq_vllm.engine.precision_state import PrecisionState
from matgptq_vllm.engine.step_buffers import StepBuffers

CATALOGUE = Catalogue(("2", "4", "8", "mix-3.0"), "8")
WIDTHS = {"2": 2, "4": 4, "8": 8, "mix-3.0": 6}
ROWS = 16


@pytest.fixture
def buffers() -> StepBuffers:
    return StepBuffers(ROWS, 8, CATALOGUE.index(None), torch.device("cpu"))


@pytest.fixture
def state(buffers: StepBuffers) -> PrecisionState:
    return PrecisionState(CATALOGUE, buffers)


def step(state: PrecisionState, buffers: StepBuffers, *req_ids: str) -> list[str]:
    """Profiles of a step of one row per request, padding last."""
    state.write_step(list(req_ids), np.ones(len(req_ids), dtype=np.int32))
    return [CATALOGUE.profiles[index] for index in buffers.token_profiles[: len(req_ids) + 1].tolist()]


def test_wider_profiles_are_read_as_the_new_max_width_padding_included(state: PrecisionState, buffers: StepBuffers) -> None:
    for req_id, precision in (("a", "2"), ("b", "8"), ("c", "mix-3.0")):
        state.add_request(req_id, precision)
    assert step(state, buffers, "a", "b", "c") == ["2", "8", "mix-3.0", "mix-3.0"]
    state.limit(4, WIDTHS)
    assert set(buffers.token_profiles.tolist()) == {CATALOGUE.index("4")}
    assert step(state, buffers, "a", "b", "c") == ["2", "4", "4", "4"]
    assert state.common_profile(["b", "c"]) == CATALOGUE.index("4")
    state.write_uniform_step(CATALOGUE.index("8"))
    assert set(buffers.token_profiles.tolist()) == {CATALOGUE.index("4")}
    state.reset_step()
    assert set(buffers.token_profiles.tolist()) == {CATALOGUE.index("4")}


def test_requests_that_follow_a_wide_level_stay_within_the_limit(state: PrecisionState, buffers: StepBuffers) -> None:
    state.add_request("a", "2", "group", num_prompt_tokens=4)
    state.limit(4, WIDTHS)
    state.follow({"group": "8"})
    state.advance(["a"], [4])
    assert step(state, buffers, "a")[0] == "4"


def test_with_the_planes_back_new_requests_are_as_wide_as_they_ask(state: PrecisionState, buffers: StepBuffers) -> None:
    state.limit(2, WIDTHS)
    state.limit(8, WIDTHS)
    state.add_request("a", None)
    state.add_request("b", "mix-3.0")
    assert step(state, buffers, "a", "b")[:2] == ["8", "mix-3.0"]
    state.reset_step()
    assert set(buffers.token_profiles.tolist()) == {CATALOGUE.index("8")}
