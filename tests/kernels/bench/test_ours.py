import pytest
import torch

from matgptq_vllm.core.planes import PlaneLayout
from matgptq_vllm.core.slicing import dequantize
from matgptq_vllm.kernels.bench import ours
from matgptq_vllm.kernels.bench.competitors import ALONE, MIXED, UNIFORM, Problem
from matgptq_vllm.kernels.bench.shapes import GemmShape
from matgptq_vllm.kernels.segments import rows_of_width


@pytest.fixture
def copies(monkeypatch) -> ours.ParentCopies:
    monkeypatch.setattr(ours, "num_copies", lambda bytes_read: 3 if bytes_read < 30_000 else 2)
    torch.manual_seed(0)
    problem = Problem(GemmShape("o", 128, 512), torch.randn(6, 512).bfloat16(), 128, "curved")
    return ours.ParentCopies(problem, [UNIFORM[8], UNIFORM[2]])


def test_all_widths_share_the_copies_and_a_wide_one_needs_fewer(copies):
    wide, narrow = copies.workload(UNIFORM[8]), copies.workload(UNIFORM[2])
    assert (len(wide.calls), len(narrow.calls)) == (2, 3)
    assert wide.calls[0].keywords["layer"] is narrow.calls[0].keywords["layer"]
    assert (wide.bytes_read, narrow.bytes_read) == (128 * 512 + 128 * 4 * 2, 128 * 512 // 4 + 128 * 4 * 2)


def test_no_two_copies_hold_the_same_memory_or_bits(copies):
    first, second = (call.keywords["layer"] for call in copies.workload(UNIFORM[8]).calls)
    for a, b in zip([*first.planes, *first[1:]], [*second.planes, *second[1:]], strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
        assert a.data_ptr() != b.data_ptr()
    assert not any(torch.equal(a, b) for a, b in zip(first.planes, second.planes, strict=True))


def test_the_reference_of_a_mixture_takes_each_row_from_its_width(copies):
    reference = copies.workload(MIXED).reference
    assert torch.equal(reference[::2], copies.workload(UNIFORM[4]).reference[::2])
    assert torch.equal(reference[1::2], copies.workload(UNIFORM[8]).reference[1::2])
    assert not torch.equal(copies.workload(UNIFORM[4]).reference[1::2], reference[1::2])


def test_the_reference_is_the_product_with_the_dequantized_parent(copies):
    codes = PlaneLayout().join(copies._first_planes, 512)
    weights = dequantize(codes, copies._first_scales, 3, "curved", 128)
    torch.testing.assert_close(copies.workload(UNIFORM[3]).reference, copies._problem.x.float() @ weights.T)


def test_profiles_hold_every_width_unless_the_replica_holds_one():
    assert ours._profiles(UNIFORM[4], 3) == ([2, 3, 4, 6, 8], [2, 2, 2])
    assert ours._profiles(MIXED, 4) == ([2, 3, 4, 6, 8], [2, 4, 2, 4])
    assert ours._profiles(ALONE[4], 2) == ([4], [0, 0])


def test_the_rows_of_a_step_are_known_by_width_whatever_its_size(copies):
    steps = copies.workload(MIXED).calls[0].keywords["steps"]
    for m in (2, 5):
        row_order, step_profiles = steps.rows(m)
        rows = rows_of_width(m, step_profiles, row_order, steps.host_profile_widths)
        assert [(width, of_width.tolist()) for width, of_width in rows] == [(4, [*range(0, m, 2)]), (8, [*range(1, m, 2)])]
    assert steps.rows(5)[0] is steps.rows(5)[0]
