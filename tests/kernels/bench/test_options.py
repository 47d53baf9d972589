import pytest

from matgptq_vllm.core.errors import InputError
from matgptq_vllm.kernels.bench.options import parse_options


def test_defaults_are_the_anchors_model_and_rows():
    options = parse_options([])
    assert options.models == ("llama-3.1-8b",)
    assert options.ms == (1, 4, 16, 32, 64, 128, 256, 512, 2048)
    assert (options.rule, options.group_size) == ("curved", 128)
    assert options.competitors[0].key == "width-8"


def test_lists_are_taken_apart_and_rows_sorted():
    options = parse_options(["--model", "qwen3-8b, llama-3.1-70b", "--m", "64,1,64", "--widths", "4", "--peers"])
    assert options.models == ("qwen3-8b", "llama-3.1-70b")
    assert options.ms == (1, 64)
    assert [c.key for c in options.competitors][-2:] == ["machete-w8", "width-4"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "gpt-5"], r"--model 'gpt-5'.*llama-3.1-8b"),
        (["--m", "0"], "--m '0'.*1 or more"),
        (["--m", "1,,2"], "--m ''"),
        (["--m", "many"], "--m 'many'"),
        (["--widths", "5"], "width 5 cannot be read"),
        (["--widths", "four"], "--widths 'four'"),
        (["--rule", "round"], "--rule 'round'.*curved or nested"),
        (["--group-size", "100"], "--group-size '100'"),
        (["--rounds", "2"], "--rounds '2'.*3 or more"),
        (["--seconds", "nan"], "--seconds 'nan'.*positive"),
        (["--only", "cutlass"], "--only names 'cutlass'.*bf16"),
    ],
)
def test_a_wrong_value_is_named_with_what_is_allowed(arguments: list[str], message: str):
    with pytest.raises(InputError, match=message):
        parse_options(arguments)
