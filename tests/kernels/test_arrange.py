"""kernels.arrange: every row gets a place in a tile of its width, and its columns the order of the tensor cores' operand."""

import json
from collections.abc import Callable

import pytest
import torch

RUN = """
import json, sys, torch
from matgptq_vllm.kernels.arrange import arrange

device = sys.argv[1]
found = {}
WIDTHS = (2, 3, 4, 6, 8)
table = torch.tensor([8, 4, 2, 4, 3], dtype=torch.int32, device=device)

def column_at(place):
    piece, i, u, j, l = place // 32, place // 16 % 2, place // 8 % 2, place // 2 % 4, place % 2
    return 32 * piece + 8 * j + 4 * i + 2 * u + l

columns = torch.tensor([column_at(place) for place in range(128)])
for m, k, block_m, done in ((1, 128, 32, None), (5, 200, 32, None), (40, 136, 32, 4), (70, 264, 64, None), (33, 128, 32, 8)):
    generator = torch.Generator().manual_seed(m)
    profiles = torch.randint(5, (m,), dtype=torch.int32, generator=generator)
    x = torch.randn(m, 2 * k, generator=generator)[:, :k]
    done_width = None if done is None else torch.tensor([done], dtype=torch.int32, device=device)
    result = arrange(x.to(device), profiles.to(device), table, WIDTHS, block_m, False, done_width)
    row_widths = table.cpu()[profiles.long()]
    tile_widths, row_places = result.tile_widths.tolist(), result.row_places.tolist()
    placed = {}
    for tile, width in enumerate(tile_widths):
        for place in range(tile * block_m, (tile + 1) * block_m) if width else ():
            row = row_places[place]
            if row >= 0:
                assert row not in placed and row_widths[row] == width, (m, row)
                placed[row] = place
    wanted = [row for row in range(m) if row_widths[row] != done]
    padded = torch.nn.functional.pad(x, (0, -k % 128))
    expected = padded.view(m, -1, 128)[:, :, columns].transpose(0, 1)
    same = all(torch.equal(result.x[:, placed[row]].cpu(), expected[:, row]) for row in wanted)
    # Within a width, rows keep their order.
    ordered = all(placed[a] < placed[b] for a in wanted for b in wanted if a < b and row_widths[a] == row_widths[b])
    found[f"{m} {k} {block_m} {done}"] = sorted(placed) == wanted and same and ordered
x = torch.randn(20, 128).to(device)
alone = arrange(x, table, table, (4,), 32, False)
found["one width"] = alone.tile_widths.tolist() == [4] and alone.row_places.tolist() == [*range(20), *[-1] * 12]
json.dump(found, open(sys.argv[2], "w"))
"""


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory, run_kernels: Callable[..., None]) -> dict[str, bool]:
    """What holds."""
    path = tmp_path_factory.mktemp("arrange") / "found.json"
    run_kernels(RUN, "cuda" if torch.cuda.is_available() else "cpu", path)
    result: dict[str, bool] = json.loads(path.read_text())
    return result


def test_rows_of_one_width_share_tiles_in_their_order_with_columns_as_the_operand_has_them(found: dict[str, bool]) -> None:
    assert len(found) == 6
    assert all(found.values()), found
