"""engine.precision_state: the buffers follow the requests of every step."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from matgptq_vllm.core.errors import InputError
from matgptq_vllm.core.precision import Catalogue
from matgptq_vllm.engine.precision_state import PrecisionState
from matgptq_vllm.engine.step_buffers import StepBuffers

CATALOGUE = Catalogue(("2", "3", "4", "8", "mix-3.0"), "8")
PRECISIONS = [None, "auto", 4, *CATALOGUE.profiles]


def make_state(max_tokens: int = 64) -> tuple[PrecisionState, torch.Tensor]:
    buffers = StepBuffers(max_tokens, len(CATALOGUE.profiles), CATALOGUE.index(None), torch.device("cpu"))
    return PrecisionState(CATALOGUE, buffers), buffers.token_profiles


def test_every_token_of_a_request_gets_its_profile() -> None:
    state, buffer = make_state(10)
    state.add_request("a", "2")
    state.add_request("b", None)
    state.add_request("c", "mix-3.0")
    address = buffer.data_ptr()
    state.write_step(["c", "a", "b"], np.array([1, 4, 2], dtype=np.int32))
    assert buffer[:7].tolist() == [4, 0, 0, 0, 0, 3, 3]
    assert buffer.data_ptr() == address
    assert state.num_steps == 1
    assert state.tokens_by_profile() == {"2": 4, "3": 0, "4": 0, "8": 2, "mix-3.0": 1}


def test_a_run_without_requests_follows_no_step() -> None:
    state, buffer = make_state(10)
    state.add_request("a", "2")
    state.add_request("b", "3")
    state.write_step(["a", "b"], np.array([4, 2], dtype=np.int32))
    state.reset_step()
    assert buffer.tolist() == [CATALOGUE.index(None)] * 10
    assert state.num_steps == 1


def test_a_request_id_can_be_used_again_with_another_precision() -> None:
    state, buffer = make_state()
    state.add_request("a", "2")
    state.remove_requests(["a", "never seen"])
    state.add_request("a", "4")
    state.write_step(["a"], np.array([3], dtype=np.int32))
    assert buffer[:3].tolist() == [2, 2, 2]
    state.remove_requests(["a"])
    with pytest.raises(KeyError):
        state.write_step(["a"], np.array([1], dtype=np.int32))


def test_an_unknown_precision_is_refused() -> None:
    state, _ = make_state()
    with pytest.raises(InputError, match="ask for one of 2, 3, 4, 8"):
        state.add_request("a", "6")


def test_a_request_of_a_group_follows_it_and_every_other_request_keeps_its_profile() -> None:
    state, buffer = make_state()
    state.add_request("follows", "8", "g", 4)
    state.add_request("named", "8")
    state.follow({"g": "2"})
    state.advance(["named", "follows"], [4, 4])
    state.write_step(["named", "follows"], np.array([1, 1], dtype=np.int32))
    assert buffer[:2].tolist() == [CATALOGUE.index("8"), CATALOGUE.index("2")]
    state.advance(["named", "follows"], [0, 0], ["named", "follows"])
    state.write_step(["named", "follows"], np.array([1, 1], dtype=np.int32))
    assert buffer[:2].tolist() == [CATALOGUE.index("8")] * 2
    with pytest.raises(InputError, match="ask for one of"):
        state.follow({"g": "7"})


@given(
    st.lists(
        st.dictionaries(st.sampled_from("abcdefg"), st.tuples(st.sampled_from(PRECISIONS), st.integers(1, 9)), min_size=1),
        min_size=1,
        max_size=6,
    ),
    st.randoms(),
)
def test_any_sequence_of_batches_in_any_order_is_written_right(steps: list[dict], rng) -> None:
    state, buffer = make_state(7 * 9)
    running: dict[str, object] = {}
    for step in steps:
        ended = [name for name in running if name not in step]
        state.remove_requests(ended)
        for name in ended:
            del running[name]
        for name, (precision, _) in step.items():
            if name not in running:
                state.add_request(name, precision)
                running[name] = precision
        order = list(step)
        rng.shuffle(order)
        counts = np.array([step[name][1] for name in order], dtype=np.int32)
        state.write_step(order, counts)
        wanted = [CATALOGUE.index(running[name]) for name, count in zip(order, counts, strict=True) for _ in range(count)]
        assert buffer[: len(wanted)].tolist() == wanted
    assert ((buffer >= 0) & (buffer < len(CATALOGUE.profiles))).all()


def test_a_step_like_the_last_one_writes_nothing_and_still_counts() -> None:
    state, buffer = make_state(10)
    state.add_request("a", "2")
    state.add_request("b", "3")
    rows = np.array([4, 2], dtype=np.int32)
    state.write_step(["a", "b"], rows)
    version = buffer._version
    state.write_step(["a", "b"], rows)
    assert buffer._version == version
    assert state.tokens_by_profile()["2"] == 8
    state.write_step(["b", "a"], rows)
    assert buffer[:6].tolist() == [1, 1, 1, 1, 0, 0]


def test_a_run_without_requests_between_two_equal_steps_is_noticed() -> None:
    state, buffer = make_state(10)
    state.add_request("a", "2")
    state.add_request("b", "3")
    rows = np.array([1, 1], dtype=np.int32)
    state.write_step(["a", "b"], rows)
    state.reset_step()
    state.write_step(["a", "b"], rows)
    assert buffer[:2].tolist() == [0, 1]


def test_the_profile_of_a_step_is_known_only_if_all_requests_share_it() -> None:
    state, _ = make_state()
    for name, precision in {"a": "2", "b": "2", "c": "3"}.items():
        state.add_request(name, precision)
    assert state.common_profile(["a", "b"]) == 0
    assert state.common_profile(["a", "c"]) is None
    assert state.common_profile(["dummy-1", "dummy-2"]) is None
    assert state.common_profile(["a", "dummy-1"]) is None
