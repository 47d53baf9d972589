"""kernels.segments: the host's view of which rows read which width."""

import torch

from matgptq_vllm.kernels.segments import rows_of_width

PROFILE_WIDTHS = torch.tensor([4, 8, 4, 2], dtype=torch.int32)
ROW_ORDER = torch.tensor([3, 0, 2, 1, 4, 5, 6], dtype=torch.int32)


def found(m: int, *counts: int):
    rows = rows_of_width(m, torch.tensor(counts, dtype=torch.int32), ROW_ORDER, PROFILE_WIDTHS)
    return rows and [(width, None if of_width is None else of_width.tolist()) for width, of_width in rows]


def test_rows_of_different_widths_are_named() -> None:
    assert found(5, 2, 3, 0, 0) == [(4, [3, 0]), (8, [2, 1, 4])]


def test_profiles_of_one_width_are_taken_together() -> None:
    assert found(5, 1, 2, 2, 0) == [(4, [3, 1, 4]), (8, [0, 2])]


def test_one_width_has_all_rows_whatever_their_number() -> None:
    assert found(7, 0, 5, 0, 0) == [(8, None)]
    assert found(3, 4, 0, 100, 0) == [(4, None)]


def test_padding_belongs_to_the_last_rows() -> None:
    assert found(7, 2, 3, 0, 0) == [(4, [3, 0]), (8, [2, 1, 4, 5, 6])]


def test_a_product_that_is_not_the_steps_has_no_known_rows() -> None:
    assert found(4, 2, 3, 0, 0) is None
