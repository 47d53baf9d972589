"""core.errors: the classes by which callers tell whose fault a failure is."""

import pytest

from matgptq_vllm.core.errors import FormatError, InputError, MatGPTQError, UnsupportedError

KINDS = (InputError, FormatError, UnsupportedError)


@pytest.mark.parametrize("kind", KINDS)
def test_every_error_is_caught_as_the_common_base_and_keeps_its_message(kind: type[MatGPTQError]) -> None:
    with pytest.raises(MatGPTQError, match="width 5"):
        raise kind("width 5")


@pytest.mark.parametrize("kind", KINDS)
def test_no_kind_is_caught_as_another(kind: type[MatGPTQError]) -> None:
    assert [other for other in KINDS if issubclass(kind, other)] == [kind]


def test_caller_and_file_faults_are_value_errors_and_unsupported_is_a_runtime_error() -> None:
    assert issubclass(InputError, ValueError)
    assert issubclass(FormatError, ValueError)
    assert issubclass(UnsupportedError, RuntimeError)
    assert not issubclass(UnsupportedError, ValueError)
