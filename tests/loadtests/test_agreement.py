"""loadtests.agreement: where two records part, and by how much."""

import json
from dataclasses import asdict
from pathlib import Path

import pytest

from loadtests.agreement import Answer, Comparison, compare, main, prompts_of


def answer(*steps: tuple[str, dict[str, float]], precision: str = "4", prompt: str = "p") -> Answer:
    return Answer(precision, prompt, [token for token, _ in steps], [candidates for _, candidates in steps])


SURE = answer(("a", {"a": -0.1, "b": -3.0}), ("c", {"c": -0.2, "d": -0.21}), ("e", {"e": -0.3, "f": -2.0}))


def test_equal_answers_differ_in_logprobs_only() -> None:
    other = answer(("a", {"a": -0.13, "b": -2.0}), ("c", {"c": -0.2}), ("e", {"e": -0.25}))
    result = compare([SURE], [other])
    assert (result.equal, result.parted) == (1, ())
    assert result.largest_difference == pytest.approx(0.05)


def test_a_near_tie_is_within_the_tolerance_and_what_follows_it_does_not_count() -> None:
    other = answer(("a", {"a": -0.1}), ("d", {"d": -0.2, "c": -0.21}), ("z", {"z": -5.0}))
    result = compare([SURE], [other])
    assert result.equal == 0
    assert result.parted == pytest.approx((0.01,))
    assert (result.beyond(0.05), result.beyond(0.005)) == (0, 1)
    assert result.largest_difference == 0


def test_a_token_that_the_first_did_not_consider_is_beyond_any_tolerance() -> None:
    result = compare([SURE], [answer(("q", {"q": -0.1}))])
    assert result.parted == (float("inf"),)
    assert result.beyond(1e9) == 1


def test_records_of_other_prompts_are_refused() -> None:
    with pytest.raises(ValueError, match="not of the same prompts"):
        compare([SURE], [answer(("a", {"a": 0.0}), prompt="other")])


def test_prompts_are_spread_over_the_text() -> None:
    text = " ".join(map(str, range(100)))
    assert prompts_of(text, 4, 2) == ["0 1", "25 26", "50 51", "75 76"]
    with pytest.raises(ValueError, match="has 100 words; 30 prompts of 4 need 120"):
        prompts_of(text, 30, 4)


def test_the_result_says_how_many_and_by_how_much() -> None:
    text = Comparison(38, (0.01, 0.2), 0.0312).text(0.05)
    assert text.startswith("38 of 40 answers are equal; 2 part, by at most 0.2000; 1 of these by 0.05 or more; ")


@pytest.mark.parametrize(("allowed", "status"), [("0", 1), ("0.5", 0)])
def test_compare_fails_beyond_the_allowed_share(allowed: str, status: int, tmp_path: Path) -> None:
    paths = [tmp_path / "first.json", tmp_path / "second.json"]
    for path, last in zip(paths, (SURE, answer(("b", {"b": -0.1}))), strict=True):
        path.write_text(json.dumps([asdict(SURE), asdict(last)]))
    assert main(["compare", *map(str, paths), "--allowed", allowed]) == status


def test_a_file_that_is_no_record_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "other.json"
    path.write_text('[{"a": 1}]')
    assert main(["compare", str(path), str(path)]) == 2
    assert f"{path} is not a record of this command" in capsys.readouterr().err


def test_a_server_that_is_not_there_is_an_error_without_a_traceback(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = tmp_path / "text.txt"
    text.write_text("word " * 400)
    out = tmp_path / "out.json"
    assert main(["record", "http://127.0.0.1:9", "--text", str(text), "--out", str(out)]) == 2
    assert capsys.readouterr().err.startswith("loadtests: ")
    assert not out.exists()
