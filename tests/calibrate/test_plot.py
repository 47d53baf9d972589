from pathlib import Path

import pytest

from calibrate.evaluate.plot import draw, make_figure
from calibrate.evaluate.report import Report, Result

ORIGINAL = Result("original, bfloat16", 16.0, 8, 10.0)
UNIFORM = [
    Result("2", 2.0, 1, 25.0, 1.5, 1.0, 0.4),
    Result("4", 4.0, 2, 10.5, 0.05, 0.05, 0.8),
    Result("8", 8.0, 4, 10.01, 0.001, 0.0005, 0.99),
]
MIXED = [Result("mix-3.0", 2.99, 1, 12.0, 0.2, 0.2, 0.7)]


def report(results: list[Result], original: Result | None = ORIGINAL) -> Report:
    return Report("dir/parent", "text.txt", 512, 1022, "model", original, results)


def test_uniform_widths_are_joined_and_mixed_profiles_stand_alone_all_with_names():
    increase, kl = make_figure(report([*UNIFORM, *MIXED])).axes
    for axes, heights in ((increase, [150, 5, 0.1]), (kl, [1.0, 0.05, 0.0005])):
        line, points = axes.lines
        assert (list(line.get_xdata()), list(line.get_ydata())) == ([2, 4, 8], pytest.approx(heights))
        assert line.get_linestyle() == "-"
        assert (list(points.get_xdata()), points.get_linestyle()) == ([2.99], "None")
        assert [text.get_text() for text in axes.texts] == ["2", "4", "8", "mix-3.0"]
        assert axes.get_yscale() == "log"


def test_a_slice_better_than_the_original_is_drawn_below_zero():
    better = Result("6", 6.0, 3, 9.99, -0.001, 0.002, 0.9)
    increase, kl = make_figure(report([*UNIFORM, better])).axes
    assert (increase.get_yscale(), kl.get_yscale()) == ("symlog", "log")
    assert increase.get_ylim()[0] < -0.1


def test_without_an_original_perplexity_is_drawn(tmp_path: Path):
    (axes,) = make_figure(report(UNIFORM[:1], original=None)).axes
    assert list(axes.lines[0].get_ydata()) == [25.0]
    draw(report(UNIFORM, original=None), tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
