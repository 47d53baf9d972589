"""kernels.arrange: every row of a mixed batch gets a place in a tile of its width."""

import json
from collections.abc import Callable

import pytest
import torch

from matgptq_vllm.kernels.arrange import as_it_is

RUN = """
import json, sys, torch
from matgptq_vllm.kernels.arrange import arrange

device = sys.argv[1]
found = {}
WIDTHS = (2, 3, 4, 6, 8)
table = torch.tensor([8, 4, 2, 4, 3], dtype=torch.int32, device=device)

for m, k, block_m in ((1, 128, 32), (5, 200, 32), (40, 134, 32), (70, 264, 64), (33, 128, 32)):
    generator = torch.Generator().manual_seed(m)
    profiles = torch.randint(5, (m,), dtype=torch.int32, generator=generator)
    x = torch.randn(m, 2 * k, generator=generator)[:, :k]
    result = arrange(x.to(device), profiles.to(device), table, WIDTHS, block_m, False)
    assert result.places % block_m == 0 and result.x.shape == (result.places, k) and result.x.stride(0) % 8 == 0
    row_widths = table.cpu()[profiles.long()]
    row_places, placed, start = result.row_places.tolist(), {}, 0
    for width in WIDTHS:
        rows = [row for row in range(m) if row_widths[row] == width]
        end = start + -(-len(rows) // block_m) * block_m
        # Rows of a width keep their order.
        found[f"{m} {k} {block_m} {width}"] = row_places[start:end] == rows + [-1] * (end - start - len(rows))
        placed |= {row: start + index for index, row in enumerate(rows)}
        start = end
    found[f"{m} {k} {block_m}"] = all(torch.equal(result.x[placed[row]].cpu(), x[row]) for row in range(m))
json.dump(found, open(sys.argv[2], "w"))
"""


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory, run_kernels: Callable[..., None]) -> dict[str, bool]:
    """What holds."""
    path = tmp_path_factory.mktemp("arrange") / "found.json"
    run_kernels(RUN, "cuda" if torch.cuda.is_available() else "cpu", path)
    result: dict[str, bool] = json.loads(path.read_text())
    return result


def test_rows_of_one_width_share_tiles_in_their_order(found: dict[str, bool]) -> None:
    assert len(found) == 30
    assert all(found.values()), found


def test_rows_of_one_width_stay_where_they_are_if_they_can_be_read_there() -> None:
    x = torch.randn(20, 264).bfloat16()[:, :136]
    alone = as_it_is(x, 32)
    assert (alone.x.data_ptr(), alone.places, alone.row_places) == (x.data_ptr(), 32, None)
    odd = torch.randn(33, 140).bfloat16()[:, 1:]
    alone = as_it_is(odd, 32)
    assert alone.places == 64
    assert alone.x.stride(0) % 8 == 0
    assert torch.equal(alone.x[:, :139], odd)
