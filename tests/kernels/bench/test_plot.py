from pathlib import Path

from matgptq_vllm.kernels.bench.competitors import ALL
from matgptq_vllm.kernels.bench.plot import draw, make_figure

MODEL = "llama-3.1-8b"


def test_every_competitor_is_a_line_of_its_own_look(results_of):
    sums = {(competitor.key, m): 10.0 * (index + 1) + m for index, competitor in enumerate(ALL) for m in (1, 16, 2048)}
    (axes,) = make_figure(results_of(sums), MODEL).axes
    assert [line.get_label() for line in axes.lines] == [competitor.label for competitor in ALL]
    assert len({(line.get_color(), line.get_marker(), line.get_linestyle()) for line in axes.lines}) == len(ALL)
    assert (axes.get_xscale(), axes.get_yscale()) == ("log", "log")
    assert "NVIDIA H200" in axes.get_title()
    assert [round(height) for height in axes.lines[0].get_ydata()] == [11, 26, 2058]


def test_what_was_not_measured_leaves_no_line(results_of):
    (axes,) = make_figure(results_of({("bf16", 1): 5.0, ("width-4", 4): 3.0}), MODEL).axes
    assert [list(line.get_xdata()) for line in axes.lines] == [[1], [4]]
    (axes,) = make_figure(results_of({}), MODEL).axes
    assert not axes.lines


def test_the_picture_is_written(results_of, tmp_path: Path):
    draw(results_of({("bf16", 1): 5.0, ("bf16", 64): 7.0}), MODEL, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
