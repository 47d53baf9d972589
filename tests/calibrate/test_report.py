import json

from calibrate.evaluate.report import Result, as_json, as_markdown, as_table

RESULTS = [
    Result("parent", "2", 123.4567, 100, 512, 2.0, 1 << 20),
    Result("parent", "mix-3.0", 9.5, 100, 512, 3.01, 3 << 19),
]


def test_table_has_one_aligned_line_per_precision():
    lines = as_table(RESULTS).splitlines()
    assert len({len(line) for line in lines}) == 1
    assert lines[1].split() == ["2", "2.00", "1.00", "123.457"]
    assert lines[2].split() == ["mix-3.0", "3.01", "1.50", "9.500"]


def test_markdown_is_a_table():
    assert as_markdown(RESULTS).splitlines()[2] == "| 2 | 2.00 | 1.00 | 123.457 |"


def test_json_is_a_record_or_a_list_of_them():
    assert json.loads(as_json(RESULTS[:1], single=True))["perplexity"] == 123.4567
    assert [record["precision"] for record in json.loads(as_json(RESULTS, single=False))] == ["2", "mix-3.0"]
