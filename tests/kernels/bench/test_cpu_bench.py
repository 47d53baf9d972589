"""kernels.bench.cpu: the table on a CPU, and what it refuses."""

import pytest

from matgptq_vllm.kernels.bench import cpu


def test_a_table_has_a_row_per_layer_and_m_and_a_cell_per_width(capsys: pytest.CaptureFixture[str]) -> None:
    assert cpu.main(["--shapes", "7m", "--m", "1,3", "--rounds", "1"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 + 4 * 2
    assert lines[2].startswith("| qkv (512 x 256) | 1 | ")
    for line in lines[2:]:
        cells = line.strip("| ").split(" | ")[2:]
        assert len(cells) == 5
        assert all(float(number) > 0 for cell in cells for number in cell.split(" / "))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--shapes", "8b"], "shapes '8b' are unknown"),
        (["--m", "1,0"], "--m '0' is not a number of rows"),
        (["--rule", "up"], "slice rule 'up' is unknown"),
        (["--rounds", "0"], "--rounds 0 times nothing"),
    ],
)
def test_wrong_input_is_refused(arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cpu.main(arguments) == 2
    assert said in capsys.readouterr().err
