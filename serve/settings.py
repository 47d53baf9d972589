"""How the HTTP side of one replica behaves, from the environment of the server process."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from matgptq_vllm.core.errors import InputError

ENV_PREFIX = "MATGPTQ_"
"""``max_body_bytes`` is read from ``MATGPTQ_MAX_BODY_BYTES``, and so on."""


MIN_KEY_CHARS = 16
"""A shorter admin key could be guessed."""


@dataclass(frozen=True)
class Settings:
    """What bounds a request, and what `auto` aims at."""

    max_body_bytes: int = 16 * 1024 * 1024
    """Largest request body, in bytes, that selection of a precision reads; a larger one is answered with 413."""

    max_header_bytes: int = 64 * 1024
    """Largest sum of request header names and values, in bytes; more is answered with 431."""

    rpc_timeout_ms: int = 2000
    """How long GET /v1/precisions waits for live numbers of the workers, in milliseconds."""

    tpot_slo_ms: float | None = None
    """Milliseconds per output token that `auto` requests without a budget of their own aim at."""

    ttft_slo_ms: float | None = None
    """Milliseconds to the first token that `auto` requests without a budget of their own aim at."""

    auto_floor: str | None = None
    """Narrowest profile that `auto` may choose; unset, the narrowest that the replica holds."""

    default_auto: bool = False
    """Whether requests that name no precision are `auto` requests."""

    elastic_running: bool = False
    """Whether running `auto` requests change their precision with the load."""

    tenants_file: str | None = None
    """YAML file of API keys and what each may ask for; unset, there are no tenants."""

    sweep_seconds: float = 5.0
    """Longest time, in seconds, to measure step times at start-up where no earlier measurement is kept; 0 measures nothing."""

    latency_cache: str | None = None
    """Folder that keeps measured step times between starts; unset, ``~/.cache/matgptq-vllm/latency``."""

    request_log: bool = False
    """Whether a JSON line per request is written to standard error."""

    admin_key: str | None = field(default=None, repr=False)
    """Key of the admin endpoints; unset, they answer 403."""

    def __post_init__(self) -> None:
        for name in ("max_body_bytes", "max_header_bytes", "rpc_timeout_ms"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise InputError(f"{name} is {value!r}; it must be a whole number of at least 1")
        for name in ("tpot_slo_ms", "ttft_slo_ms"):
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value > 0):
                raise InputError(f"{name} is {value!r}; it must be a number of milliseconds above 0")
        if self.admin_key is not None and len(self.admin_key) < MIN_KEY_CHARS:
            raise InputError(
                f"the admin key has {len(self.admin_key)} characters; it needs {MIN_KEY_CHARS} or more, or unset it"
            )
        if not (math.isfinite(self.sweep_seconds) and 0 <= self.sweep_seconds <= 600):
            raise InputError(f"sweep_seconds is {self.sweep_seconds!r}; it must be from 0 to 600")

    @classmethod
    def from_env(cls, environ: Mapping[str, str]) -> "Settings":
        """The settings in ``environ``; the defaults where it has none. InputError if a value cannot be read."""
        given: dict[str, Any] = {
            setting.name: _parse(env_name(setting.name), environ[env_name(setting.name)], setting.type)
            for setting in fields(cls)
            if env_name(setting.name) in environ
        }
        return cls(**given)


def env_name(field: str) -> str:
    """The environment variable that sets ``field``."""
    return ENV_PREFIX + field.upper()


def to_env(settings: Mapping[str, object]) -> dict[str, str]:
    """Environment variables that set these fields; those that are None are left out."""
    shown = {name: str(value).lower() if isinstance(value, bool) else str(value) for name, value in settings.items()}
    return {env_name(name): text for name, text in shown.items() if settings[name] is not None}


def _parse(name: str, text: str, kind: Any) -> object:
    if kind is int:
        if not (text.isascii() and text.isdigit()):
            raise InputError(f"environment variable {name} is {text!r}; it must be a whole number of at least 1")
        return int(text)
    if kind is bool:
        if text not in ("true", "false"):
            raise InputError(f"environment variable {name} is {text!r}; it must be true or false")
        return text == "true"
    if kind in (float, float | None):
        try:
            return float(text)
        except ValueError:
            raise InputError(f"environment variable {name} is {text!r}; it must be a number") from None
    return text
