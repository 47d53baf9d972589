"""engine.step_buffers: the buffers always describe the step, whatever was written before."""

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from matgptq_vllm.engine.step_buffers import ANY_PROFILE, StepBuffers
from matgptq_vllm.kernels.segments import rows_of_width

MAX_TOKENS, MAX_PROFILES, DEFAULT = 40, 6, 4
WIDTHS = torch.tensor([2, 3, 4, 4, 8, 3], dtype=torch.int32)


def make_buffers() -> StepBuffers:
    return StepBuffers(MAX_TOKENS, MAX_PROFILES, DEFAULT, torch.device("cpu"))


def write(buffers: StepBuffers, *requests: tuple[int, int]) -> None:
    """Write a step of (profile, rows) per request."""
    profiles, num_tokens = np.array(requests, dtype=np.int32).T
    buffers.write(profiles, num_tokens)


def addresses(buffers: StepBuffers) -> list[int]:
    return [tensor.data_ptr() for tensor in (buffers.token_profiles, buffers.row_order, buffers.step_profiles)]


def test_before_the_first_step_every_row_is_the_default_profiles() -> None:
    buffers = make_buffers()
    assert buffers.token_profiles.tolist() == [DEFAULT] * MAX_TOKENS
    assert buffers.row_order.tolist() == [*range(MAX_TOKENS)]
    assert buffers.step_profiles.tolist() == [0, 0, 0, 0, MAX_TOKENS, 0]


def test_rows_are_sorted_by_profile_and_keep_their_order_within_one() -> None:
    buffers = make_buffers()
    write(buffers, (5, 2), (0, 1), (5, 1), (1, 2))
    assert buffers.token_profiles[:6].tolist() == [5, 5, 0, 5, 1, 1]
    assert buffers.row_order[:8].tolist() == [2, 4, 5, 0, 1, 3, 6, 7]
    assert buffers.step_profiles.tolist() == [1, 2, 0, 0, 0, 3]
    # Padding reads what the last rows in order read.
    assert set(buffers.token_profiles[6:].tolist()) == {5}


def test_a_step_of_one_profile_again_touches_nothing() -> None:
    buffers = make_buffers()
    write(buffers, (2, 7), (2, 1))
    versions = [tensor._version for tensor in (buffers.token_profiles, buffers.row_order)]
    write(buffers, (2, 30))
    assert [tensor._version for tensor in (buffers.token_profiles, buffers.row_order)] == versions
    assert buffers.token_profiles.tolist() == [2] * MAX_TOKENS


def test_a_reset_leaves_no_trace_of_the_last_step() -> None:
    buffers, fresh = make_buffers(), make_buffers()
    write(buffers, (0, 20), (5, 9), (0, 11))
    buffers.reset()
    for name in ("token_profiles", "row_order", "step_profiles"):
        assert torch.equal(getattr(buffers, name), getattr(fresh, name))


@given(
    st.lists(
        st.lists(st.tuples(st.integers(0, MAX_PROFILES - 1), st.integers(1, 8)), min_size=1, max_size=5), min_size=1, max_size=6
    )
)
def test_any_steps_are_described_right_for_the_device_and_the_host(steps: list[list[tuple[int, int]]]) -> None:
    buffers = make_buffers()
    before = addresses(buffers)
    for step in steps:
        write(buffers, *step)
        wanted = [profile for profile, count in step for _ in range(count)]
        total = len(wanted)
        profiles, order = buffers.token_profiles.tolist(), buffers.row_order.tolist()
        assert profiles[:total] == wanted
        # A permutation of any number of rows from the step's to all, sorted by profile.
        assert sorted(order[:total]) == [*range(total)]
        assert order[total:] == [*range(total, MAX_TOKENS)]
        in_order = [profiles[row] for row in order]
        assert in_order == sorted(in_order)
        for m in (total, MAX_TOKENS):
            found = rows_of_width(m, buffers.step_profiles, buffers.row_order, WIDTHS)
            assert found is not None
            rows = {row: width for width, rows in found for row in (range(m) if rows is None else rows.tolist())}
            assert rows == {row: int(WIDTHS[profiles[row]]) for row in range(m)}
            assert sum(m if rows is None else len(rows) for _, rows in found) == m
    assert addresses(buffers) == before


def test_while_a_graph_of_one_profile_is_captured_its_kernels_are_known() -> None:
    buffers = make_buffers()
    write(buffers, (0, 1), (5, 1))
    buffers.prepare_capture(2)
    assert buffers.graph_profile.tolist() == [2]
    assert buffers.token_profiles.tolist() == [2] * MAX_TOKENS
    buffers.reset()
    assert buffers.graph_profile.tolist() == [ANY_PROFILE]
    assert buffers.token_profiles.tolist() == [DEFAULT] * MAX_TOKENS


def test_there_is_no_memory_of_the_device_but_that_which_layers_register() -> None:
    # vLLM's sleep of level 2 keeps the buffers of the model, and loses whatever else was made while it was loaded.
    held = {name for name, value in vars(make_buffers()).items() if isinstance(value, torch.Tensor)}
    assert held == {"token_profiles", "row_order", "step_profiles", "graph_profile"}
