from dataclasses import replace

from matgptq_vllm.kernels.bench.ratios import Ratio
from matgptq_vllm.kernels.bench.report import aligned, as_markdown, as_text, model_tables, ratio_text
from matgptq_vllm.kernels.bench.results import Failure
from matgptq_vllm.kernels.bench.shapes import MODELS

MODEL = "llama-3.1-8b"
SUMS = {("bf16", 1): 124.9, ("bf16", 128): 142.9, ("marlin-w4", 1): 78.7, ("marlin-w4", 128): 215.7, ("width-4", 1): 54.5}


def test_tables_have_a_row_per_competitor_and_a_column_per_m(results_of):
    (_, times), (_, ratios), (title, rates) = model_tables(results_of(SUMS), MODEL, MODELS[MODEL])
    assert times == [
        ["M =", "1", "128"],
        ["cuBLAS bf16", "124.9", "142.9"],
        ["Marlin W4", "78.7", "215.7"],
        ["width 4", "54.5", "-"],
    ]
    assert ratios == [["M =", "1", "128"], ["width 4", "1.44x met", "-"]]
    # 109 MB in 54.5 µs are 2.0 TB/s: half of the copy's 4.0, and 42% of the data sheet's 4.8.
    assert rates[3] == ["width 4", "50% (42%)", "-"]
    assert "4.8 TB/s" in title


def test_without_a_data_sheet_only_the_copy_is_a_measure(results_of):
    *_, (title, rates) = model_tables(results_of(SUMS, name="Unknown"), MODEL, MODELS[MODEL])
    assert rates[3][1] == "50%"
    assert "data sheet" not in title


def test_a_ratio_says_whether_its_target_is_met():
    assert ratio_text(Ratio(1.432, "x", True, 1.4)) == "1.43x met"
    assert ratio_text(Ratio(1.31, "x", True, 1.4)) == "1.31x (1.40)"
    assert ratio_text(Ratio(1.12, "x", False, 1.05)) == "/1.12 (1.05)"
    assert ratio_text(Ratio(0.9, "x", False, None)) == "/0.90"


def test_columns_line_up():
    assert aligned([["a", "10", "2"], ["bcd", "3", "400"]]) == "a    10    2\nbcd   3  400"


def test_text_and_markdown_say_what_is_not_available_and_why(results_of):
    failures = (
        Failure(MODEL, "o", "machete-w4", None, "no such operator"),
        Failure(MODEL, "o", "width-4", 64, "its output is wrong"),
    )
    results = results_of(SUMS, failures)
    for page in (as_text(results), as_markdown(results, {})):
        assert f"{MODEL} o: Machete W4 not available: no such operator" in page
        assert "width 4 at M = 64 not available: its output is wrong" in page


def test_markdown_shows_the_plot_and_the_spread_of_every_layer(results_of):
    page = as_markdown(results_of(SUMS), {MODEL: "picture.png"})
    assert "![Time against M](picture.png)" in page
    assert "### llama-3.1-8b gate_up, 28672 x 4096" in page
    assert "| width 4 | 29.3 (26.4 to 32.3) | - |" in page
    assert "NVIDIA H200, torch 2.11.0; bfloat16 activations, group size 128, rule curved" in page


def test_a_run_of_which_nothing_was_measured_still_reports(results_of):
    results = replace(results_of({}), failures=[Failure(MODEL, "o", "bf16", None, "out of memory")])
    assert "out of memory" in as_text(results)
    assert "out of memory" in as_markdown(results, {})
