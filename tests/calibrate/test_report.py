import json

from calibrate.evaluate.report import Report, Result, TaskResult, as_json, as_markdown, as_text

RESULTS = (
    Result("2", 2.0, 1 << 20, 123.4567, 1.5, 0.75, 0.5),
    Result("mix-3.0", 3.01, 3 << 19, 9.5, -0.0125, 0.00012, 0.9876),
)
ORIGINAL = Result("original, bfloat16", 16.0, 8 << 20, 9.62)
COMPARED = Report("parent", "text.txt", 512, 1022, "model", ORIGINAL, RESULTS)
ALONE = Report("parent", "text.txt", 512, 1022, results=[Result("2", 2.0, 1 << 20, 123.4567)], notes=["KL is left out: why"])
TASKS = Report(
    "parent",
    url="http://host:1",
    tasks=[
        TaskResult("2", "quiz", "acc", 0.25, 0.125, 12),
        TaskResult("2", "quiz", "acc_norm", 0.5, None, 12),
        TaskResult("8", "quiz", "acc", 0.75, 0.125, 12),
    ],
)


def test_the_table_begins_with_the_original_and_is_aligned():
    lines = as_text(COMPARED).splitlines()
    assert len({len(line) for line in lines}) == 1
    assert lines[1].split() == ["original,", "bfloat16", "16.00", "8.00", "9.620"]
    assert lines[2].split() == ["2", "2.00", "1.00", "123.457", "+150.00%", "0.75000", "50.00%"]
    assert lines[3].split() == ["mix-3.0", "3.01", "1.50", "9.500", "-1.25%", "0.00012", "98.76%"]


def test_without_an_original_its_columns_are_left_out_and_the_report_says_why():
    header, row, _, note = as_text(ALONE).splitlines()
    assert header.split() == ["precision", "bits/weight", "weights", "MiB", "perplexity"]
    assert row.split() == ["2", "2.00", "1.00", "123.457"]
    assert note == "note: KL is left out: why"


def test_tasks_have_a_row_per_metric_and_a_column_per_precision():
    lines = as_text(TASKS).splitlines()
    assert lines[0].split() == ["task", "metric", "2", "8"]
    assert lines[1].split() == ["quiz", "acc", "0.25", "±", "0.12", "0.75", "±", "0.12"]
    assert lines[2].split() == ["quiz", "acc_norm", "0.5"]


def test_markdown_has_table_plot_tasks_and_notes():
    page = as_markdown(COMPARED, plot=True)
    assert "1,022 scored tokens of `text.txt` in windows of 512, compared with `model`." in page
    assert "| 2 | 2.00 | 1.00 | 123.457 | +150.00% | 0.75000 | 50.00% |" in page
    assert "(quality.png)" in page
    alone = as_markdown(ALONE, plot=False)
    assert "| 2 | 2.00 | 1.00 | 123.457 |" in alone
    assert "Note: KL is left out: why." in alone
    assert "png" not in alone
    tasks = as_markdown(TASKS, plot=False)
    assert "through the server at http://host:1" in tasks
    assert "| quiz | acc_norm | 0.5 |  |" in tasks


def test_json_has_every_field():
    document = json.loads(as_json(COMPARED))
    assert document["original"]["perplexity"] == 9.62
    assert [result["precision"] for result in document["results"]] == ["2", "mix-3.0"]
    assert document["results"][1]["top1_agreement"] == 0.9876
    assert json.loads(as_json(TASKS))["tasks"][1]["stderr"] is None
