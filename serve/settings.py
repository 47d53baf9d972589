"""Limits of the HTTP side of one replica, from the environment of the server process."""

from collections.abc import Mapping
from dataclasses import dataclass, fields

from matgptq_vllm.core.errors import InputError

ENV_PREFIX = "MATGPTQ_"
"""``max_body_bytes`` is read from ``MATGPTQ_MAX_BODY_BYTES``, and so on."""


@dataclass(frozen=True)
class Settings:
    """What bounds one request."""

    max_body_bytes: int = 16 * 1024 * 1024
    """Largest request body, in bytes, that selection of a precision reads; a larger one is answered with 413."""

    max_header_bytes: int = 64 * 1024
    """Largest sum of request header names and values, in bytes; more is answered with 431."""

    rpc_timeout_ms: int = 2000
    """How long GET /v1/precisions waits for live numbers of the workers, in milliseconds."""

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise InputError(f"{field.name} is {value!r}; it must be a whole number of at least 1")

    @classmethod
    def from_env(cls, environ: Mapping[str, str]) -> "Settings":
        """The settings in ``environ``; the defaults where it has none. InputError if a value is not a positive integer."""
        given = {}
        for field in fields(cls):
            name = env_name(field.name)
            if name in environ:
                text = environ[name]
                if not (text.isascii() and text.isdigit()):
                    raise InputError(f"environment variable {name} is {text!r}; it must be a whole number of at least 1")
                given[field.name] = int(text)
        return cls(**given)


def env_name(field: str) -> str:
    """The environment variable that sets ``field``."""
    return ENV_PREFIX + field.upper()
