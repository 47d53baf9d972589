"""Limits from the environment."""

import pytest

from matgptq_vllm.core.errors import InputError
from serve.settings import Settings, env_name


def test_unset_variables_give_the_defaults():
    assert Settings.from_env({"PATH": "/bin"}) == Settings()
    assert Settings().max_body_bytes == 16 * 1024 * 1024


def test_each_field_has_its_variable():
    environ = {"MATGPTQ_MAX_BODY_BYTES": "10", "MATGPTQ_MAX_HEADER_BYTES": "20", "MATGPTQ_RPC_TIMEOUT_MS": "30"}
    assert Settings.from_env(environ) == Settings(10, 20, 30)
    assert env_name("max_body_bytes") == "MATGPTQ_MAX_BODY_BYTES"


@pytest.mark.parametrize("value", ["", "0", "-1", "1.5", "ten", "1e3", "٣"])
def test_what_is_no_positive_integer_is_refused(value):
    with pytest.raises(InputError, match="whole number"):
        Settings.from_env({"MATGPTQ_MAX_BODY_BYTES": value})
