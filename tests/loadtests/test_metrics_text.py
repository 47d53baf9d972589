"""loadtests.metrics_text: sums of samples."""

import pytest

from loadtests.metrics_text import by_label, totals

TEXT = """\
# HELP seconds Of steps.
# TYPE seconds histogram
seconds_bucket{le="0.1",engine="0"} 7.0
seconds_sum{engine="0"} 1.5
seconds_count{engine="0"} 30.0
seconds_sum{engine="1"} 0.5
seconds_count{engine="1"} 10.0
# TYPE tokens counter
tokens_total{precision="8",reason="header"} 12.0
tokens_total{precision="8",reason="a } of \\"budget\\""} 5.0
tokens_total{precision="2",reason="budget"} 7.0 1700000000
tokens_total_of_others{reason="budget"} 9.0
# TYPE memory gauge
memory 3e9
"""


def test_labels_are_summed() -> None:
    assert totals(TEXT) == {
        "seconds_bucket": 7.0,
        "seconds_sum": 2.0,
        "seconds_count": 40.0,
        "tokens_total": 24.0,
        "tokens_total_of_others": 9.0,
        "memory": 3e9,
    }


def test_only_names_that_begin_with_the_prefix_are_read() -> None:
    assert totals(TEXT, "seconds_c") == {"seconds_count": 40.0}
    assert totals(f"{TEXT}no metric at all\n", "memory") == {"memory": 3e9}
    with pytest.raises(ValueError, match="could not convert"):
        totals(f"{TEXT}no metric at all\n")


def test_a_label_keeps_its_values_apart_and_sums_over_the_others() -> None:
    assert by_label(TEXT, "tokens_total", "precision") == {"8": 17.0, "2": 7.0}
    assert by_label(TEXT, "nothing", "precision") == {}
