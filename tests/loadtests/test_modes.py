"""loadtests.modes: when runs agree, and what is said when they do not."""

from pathlib import Path

import pytest

from loadtests.agreement import Answer, Comparison
from loadtests.modes import Row, failed, main, rows_of


def answers(*tokens: str, precision: str = "4") -> list[Answer]:
    """One answer of one token per argument; all know both tokens, a as the better one by 0.04."""
    return [Answer(precision, f"prompt {i}", [token], [{"a": -0.5, "b": -0.54}]) for i, token in enumerate(tokens)]


def row(equal: int, *parted: float, mode: str = "graphs", in_flight: int = 256, precision: str = "4") -> Row:
    return Row(mode, in_flight, precision, Comparison(equal, parted, 0.0))


def test_a_row_per_precision() -> None:
    reference = [*answers("a", "a"), *answers("a", precision="2")]
    rows = rows_of("graphs", 8, reference, [*answers("a", "b"), *answers("a", precision="2")])
    assert [(row.mode, row.in_flight, row.precision) for row in rows] == [("graphs", 8, "4"), ("graphs", 8, "2")]
    assert [(row.result.equal, len(row.result.parted)) for row in rows] == [(1, 1), (1, 0)]
    assert rows[0].cells(0.05)[:7] == ["graphs", "8", "4", "1", "1", "0.0400", "0"]


def test_near_ties_may_part_in_fewer_than_the_share() -> None:
    assert failed([row(99, 0.04), row(50, precision="2")], 0.05, 0.02) == []
    assert failed([row(98, 0.04, 0.01)], 0.05, 0.02) == ["graphs, 256 in flight: 2 of 100 answers part; less than 2% may"]


def test_every_run_is_judged_for_itself_over_all_its_precisions() -> None:
    rows = [row(60, 0.01), row(38, 0.01, precision="2"), row(1000, in_flight=1)]
    assert failed(rows, 0.05, 0.02) == ["graphs, 256 in flight: 2 of 100 answers part; less than 2% may"]


def test_one_answer_that_parts_where_the_first_was_sure_is_too_many() -> None:
    assert failed([row(999, 0.06)], 0.05, 0.02) == ["graphs, 256 in flight: 1 of 1000 answers part by 0.05 or more"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [(["--modes", "eager,fast"], "'fast' is not a mode; there are eager, graphs"), (["--num-prompts", "500"], "need 20000")],
)
def test_what_cannot_be_asked_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments, said) -> None:
    text = tmp_path / "text.txt"
    text.write_text("word " * 4000)
    command = ["no-parent", "--text", str(text), "--out", str(tmp_path / "out"), *arguments]
    assert main(command) == 2
    assert said in capsys.readouterr().err


def test_a_server_that_does_not_start_is_an_error_with_its_log(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = tmp_path / "text.txt"
    text.write_text("word " * 4000)
    assert main([str(tmp_path), "--text", str(text), "--out", str(tmp_path / "out")]) == 2
    assert "eager.log" in capsys.readouterr().err
    assert "matgptq" in (tmp_path / "out" / "eager.log").read_text()
