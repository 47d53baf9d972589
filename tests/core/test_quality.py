"""core.quality: the perplexities that a parent's evaluation report has."""

import pytest

from matgptq_vllm.core.errors import FormatError
from matgptq_vllm.core.quality import QUALITY_FILE, read_perplexities


def test_a_parent_without_a_report_has_no_perplexities(tmp_path):
    assert read_perplexities(tmp_path) == {}


def test_what_was_measured_is_read_and_what_is_no_number_is_left_out(tmp_path):
    rows = '{"precision": "2", "perplexity": 60.5}, {"precision": "8", "perplexity": NaN}'
    (tmp_path / QUALITY_FILE).write_text(f'{{"results": [{rows}]}}')
    assert read_perplexities(tmp_path) == {"2": 60.5}


@pytest.mark.parametrize("text", ["", "[]", '{"results": 3}', '{"results": [{"precision": "2"}]}', '{"results": null}'])
def test_a_damaged_report_is_refused_with_what_to_do(tmp_path, text):
    (tmp_path / QUALITY_FILE).write_text(text)
    with pytest.raises(FormatError, match="delete it, or measure again"):
        read_perplexities(tmp_path)
