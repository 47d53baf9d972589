"""Limits from the environment."""

import pytest

from matgptq_vllm.core.errors import InputError
from serve.settings import Settings, env_name, to_env


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


def test_what_auto_aims_at_comes_from_the_environment_too():
    environ = {
        "MATGPTQ_TPOT_SLO_MS": "30.5",
        "MATGPTQ_AUTO_FLOOR": "3",
        "MATGPTQ_DEFAULT_AUTO": "true",
        "MATGPTQ_SWEEP_SECONDS": "0",
        "MATGPTQ_TENANTS_FILE": "/etc/tenants.yaml",
    }
    found = Settings.from_env(environ)
    assert (found.tpot_slo_ms, found.ttft_slo_ms, found.auto_floor, found.default_auto) == (30.5, None, "3", True)
    assert (found.sweep_seconds, found.tenants_file) == (0.0, "/etc/tenants.yaml")
    given = {"tpot_slo_ms": 30.5, "auto_floor": "3", "default_auto": True, "ttft_slo_ms": None, "sweep_seconds": 0.0}
    assert Settings.from_env({**to_env(given), "MATGPTQ_TENANTS_FILE": "/etc/tenants.yaml"}) == found


@pytest.mark.parametrize(
    ("name", "value", "told"),
    [
        ("TPOT_SLO_MS", "fast", "must be a number"),
        ("TPOT_SLO_MS", "0", "milliseconds above 0"),
        ("TTFT_SLO_MS", "nan", "milliseconds above 0"),
        ("DEFAULT_AUTO", "yes", "true or false"),
        ("SWEEP_SECONDS", "-1", "from 0 to 600"),
        ("SWEEP_SECONDS", "inf", "from 0 to 600"),
    ],
)
def test_a_wrong_value_is_refused_with_what_is_allowed(name, value, told):
    with pytest.raises(InputError, match=told):
        Settings.from_env({f"MATGPTQ_{name}": value})


def test_the_admin_key_is_not_shown():
    assert "secret" not in repr(Settings.from_env({"MATGPTQ_ADMIN_KEY": "secret-of-the-admin"}))
