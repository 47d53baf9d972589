"""core.planes: bits into planes and back, against bit arithmetic on plain integers."""

import re
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from matgptq_vllm.core.errors import FormatError
from matgptq_vllm.core.planes import DEFAULT_PLANE_WIDTHS, K_ALIGNMENT, PlaneLayout, _fields_of_bytes
from matgptq_vllm.core.precision import WIDTHS

LAYOUTS = ((2, 1, 1, 2, 2), (1,) * 8, (2, 1, 1, 1, 1, 1, 1), (2, 1, 1, 2, 1, 1), (1, 1, 1, 1, 2, 2), (1, 1, 1, 1, 1, 1, 2))
RAGGED = (1, 2, 3, 5, 7, 8, 9, 17, 31, 33, 127, 129, 130, 896)
FORMAT_PAGE = Path(__file__).parents[2] / "docs" / "format.md"

every_layout = pytest.mark.parametrize("widths", LAYOUTS)


def plain_planes(codes: list[list[int]], widths: tuple[int, ...]) -> list[list[list[int]]]:
    """The planes of ``codes`` as bytes, from the definition: bit ``p`` of a row's plane is bit ``p % 8`` of byte ``p // 8``."""
    planes, lowest = [], 8
    for width in widths:
        lowest -= width
        rows = []
        for row in codes:
            bits = sum(((code >> lowest) % 2**width) << (width * k) for k, code in enumerate(row))
            rows.append(list(bits.to_bytes(-(-len(row) * width // 8), "little")))
        planes.append(rows)
    return planes


def random_codes(n: int, k: int) -> torch.Tensor:
    return torch.randint(0, 256, (n, k), dtype=torch.uint8, generator=torch.Generator().manual_seed(1000 * n + k))


@every_layout
@pytest.mark.parametrize("position", range(8))
def test_every_code_at_every_position_of_a_byte_is_stored_as_defined(widths: tuple[int, ...], position: int) -> None:
    # Row q holds code q at ``position`` and its complement everywhere else, so that a leak between neighbours shows.
    codes = (255 - torch.arange(256, dtype=torch.uint8))[:, None].repeat(1, 8)
    codes[:, position] = torch.arange(256, dtype=torch.uint8)
    layout = PlaneLayout(widths)
    planes = layout.split(codes)
    assert [plane.tolist() for plane in planes] == plain_planes(codes.tolist(), widths)
    for count in range(1, len(widths) + 1):
        kept = 0xFF << (8 - sum(widths[:count])) & 0xFF
        assert torch.equal(layout.join(planes[:count], 8), codes & kept)


@pytest.mark.parametrize("n", RAGGED)
@pytest.mark.parametrize("k", RAGGED)
def test_ragged_shapes_survive_split_and_join_of_every_prefix(n: int, k: int) -> None:
    layout = PlaneLayout()
    codes = random_codes(n, k)
    planes = layout.split(codes)
    for index, plane in enumerate(planes):
        assert plane.dtype == torch.uint8
        assert plane.shape == (n, layout.packed_columns(index, k))
    for count in range(1, len(planes) + 1):
        kept = 0xFF << (8 - sum(DEFAULT_PLANE_WIDTHS[:count])) & 0xFF
        assert torch.equal(layout.join(planes[:count], k), codes & kept)


@every_layout
@pytest.mark.parametrize("k", RAGGED)
def test_ragged_rows_are_stored_as_defined_with_zero_padding(widths: tuple[int, ...], k: int) -> None:
    codes = random_codes(3, k)
    assert [plane.tolist() for plane in PlaneLayout(widths).split(codes)] == plain_planes(codes.tolist(), widths)


@pytest.mark.parametrize("n", [1, 2, 3, 5, 8, 17])
def test_planes_cut_along_n_anywhere_are_the_planes_of_the_cut_codes(n: int) -> None:
    layout = PlaneLayout()
    codes = random_codes(n, 33)
    planes = layout.split(codes)
    for start in range(n):
        for end in range(start + 1, n + 1):
            for plane, of_cut in zip(planes, layout.split(codes[start:end]), strict=True):
                assert torch.equal(plane[start:end], of_cut)


@every_layout
@pytest.mark.parametrize("k", [8, 16, 33, 40, 130])
def test_planes_cut_along_k_at_the_alignment_are_the_planes_of_the_cut_codes(widths: tuple[int, ...], k: int) -> None:
    layout = PlaneLayout(widths)
    codes = random_codes(3, k)
    planes = layout.split(codes)
    cuts = [*range(0, k, K_ALIGNMENT), k]
    for start in cuts[:-1]:
        for end in (cut for cut in cuts if cut > start):
            of_cut = layout.split(codes[:, start:end])
            for index, width in enumerate(widths):
                shard = planes[index][:, start * width // 8 : -(-end * width // 8)]
                assert torch.equal(shard, of_cut[index])


@every_layout
def test_the_planes_of_a_width_hold_its_bits_and_no_plane_more(widths: tuple[int, ...]) -> None:
    layout = PlaneLayout(widths)
    for bits in range(1, 9):
        count = layout.num_planes(bits)
        assert sum(widths[:count]) >= bits > sum(widths[: count - 1])
    for width in WIDTHS:
        assert sum(widths[: layout.num_planes(width)]) == width


@pytest.mark.parametrize("bits", [9, 16])
def test_more_bits_than_a_code_has_are_refused(bits: int) -> None:
    with pytest.raises(ValueError, match=f"8 bits, {bits} "):
        PlaneLayout().num_planes(bits)


@pytest.mark.parametrize(
    "widths", [(), (8,), (4, 4), (2, 2, 2, 2), (2, 1, 1, 4), (2, 2, 1, 1, 2), (1, 1, 2, 2, 2), (3, 1, 2, 2), (2, 1, 1, 2, 1)]
)
def test_plane_widths_that_lose_a_width_are_refused(widths: tuple[int, ...]) -> None:
    if widths == (1, 1, 2, 2, 2):
        with pytest.raises(FormatError, match=r"no prefix of \[3\]"):
            PlaneLayout(widths)
    else:
        with pytest.raises(FormatError, match=re.escape(str(list(widths)))):
            PlaneLayout(widths)


@pytest.mark.parametrize("widths", [("2", "1", "1", "2", "2"), (2.0, 1, 1, 2, 2), (2, True, True, 2, 2), (None,)])
def test_plane_widths_that_are_not_integers_are_refused(widths: tuple) -> None:
    with pytest.raises(FormatError, match="plane widths"):
        PlaneLayout(widths)


def test_codes_that_are_a_transposed_or_strided_view_are_stored_alike() -> None:
    codes = random_codes(24, 40)
    layout = PlaneLayout()
    for view in (codes.t(), codes[::2], codes[:, ::3], codes[:, 1:34]):
        for plane, of_copy in zip(layout.split(view), layout.split(view.clone()), strict=True):
            assert torch.equal(plane, of_copy)


@given(st.data(), st.sampled_from(LAYOUTS), st.integers(1, 5), st.integers(1, 70))
@settings(deadline=None, max_examples=60)
def test_any_codes_round_trip_through_any_layout(data: st.DataObject, widths: tuple[int, ...], n: int, k: int) -> None:
    rows = data.draw(st.binary(min_size=n * k, max_size=n * k))
    codes = torch.tensor(list(rows), dtype=torch.uint8).view(n, k)
    layout = PlaneLayout(widths)
    planes = layout.split(codes)
    assert [plane.tolist() for plane in planes] == plain_planes(codes.tolist(), widths)
    assert torch.equal(layout.join(planes, k), codes)


def test_the_worked_example_of_the_format_page_is_true() -> None:
    page = FORMAT_PAGE.read_text(encoding="utf-8")
    codes_line = re.search(r"^codes +([0-9 ]+)$", page, re.MULTILINE)
    planes_found = re.findall(r"^plane(\d) +\w\.\.\w +((?:0x[0-9a-f]{2} ?)+)", page, re.MULTILINE)
    assert codes_line is not None
    codes = torch.tensor([[int(code) for code in codes_line[1].split()]], dtype=torch.uint8)
    stated = {int(plane): [int(byte, 16) for byte in stored.split()] for plane, stored in planes_found}
    computed = [plane[0].tolist() for plane in PlaneLayout().split(codes)]
    assert stated == dict(enumerate(computed))


def test_nothing_is_kept_where_weights_are() -> None:
    """An engine that sleeps loses what is on its device, weights and all else that was made while they were loaded."""
    codes = torch.arange(256, dtype=torch.uint8).repeat(2, 1)
    planes = PlaneLayout().split(codes)
    _fields_of_bytes.cache_clear()
    with torch.device("meta"):
        joined = PlaneLayout().join(planes, 256)
        assert _fields_of_bytes(2, 6).device.type == "cpu"
    assert torch.equal(joined, codes)
