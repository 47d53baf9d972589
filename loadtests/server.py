"""The server under load: what it serves, and its metrics."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import httpx

from loadtests.metrics_text import totals
from matgptq_vllm.core.errors import InputError

KEY_VARIABLE = "OPENAI_API_KEY"
"""Environment variable of the server's API key, which the generator reads too. Never an option: others could list it."""

DEFAULT, MIX, AUTO = "default", "mix", "auto"
"""What a load can be besides one precision: requests that name none; drawn from several; chosen by the server."""

PROBE_TIMEOUT_S = 30


@dataclass(frozen=True)
class Server:
    """A running server."""

    url: str
    model: str
    """Served model name."""
    root: str
    """What the server loaded: the folder of the parent, on the server's machine."""
    longest: int | None
    """Tokens of the longest request, prompt and answer."""
    version: str
    """Of vLLM."""
    bits: dict[str, float]
    """Average width of every precision that it holds; empty: not a replica of this project."""

    def describe(self) -> dict[str, Any]:
        """For reports, which others may read: no paths of machines."""
        return {"url": self.url, "model": self.model, "vllm": self.version, "precisions": list(self.bits)}

    def check_precisions(self, names: Sequence[str]) -> None:
        """InputError if one of ``names`` is not to be had here."""
        wrong = [name for name in names if name not in (*self.bits, DEFAULT, MIX, AUTO)]
        if wrong and self.bits:
            offered = ", ".join([*self.bits, AUTO, MIX, DEFAULT])
            raise InputError(f"{self.url} does not offer precision {', '.join(wrong)}; it offers {offered}")
        if not self.bits and set(names) != {DEFAULT}:
            raise InputError(
                f"{self.url} has no precisions (GET /v1/precisions is not answered): load it with --precisions {DEFAULT}, "
                "or name it in --against"
            )

    def uniform(self) -> list[str]:
        """The precisions that are plain widths."""
        return [name for name in self.bits if name.isdigit()]

    def metrics(self) -> dict[str, float]:
        """Sum over the labels of every sample of /metrics, by name.

        Raises:
            httpx.HTTPError: the server does not answer.
        """
        return totals(_get(self.url, "/metrics").text)


def probe(url: str, model: str | None = None) -> Server:
    """Ask a server what it is.

    Args:
        model: served model name; None: the first that the server lists.

    Raises:
        InputError: nobody answers, it is no OpenAI-compatible server, or it does not serve ``model``.
    """
    url = url.rstrip("/")
    try:
        models = _get(url, "/v1/models").json()["data"]
        version = httpx.get(f"{url}/version", headers=authorization(), timeout=PROBE_TIMEOUT_S)
        precisions = httpx.get(f"{url}/v1/precisions", headers=authorization(), timeout=PROBE_TIMEOUT_S)
    except httpx.HTTPStatusError as error:
        hint = f"; put the server's key into {KEY_VARIABLE}" if error.response.status_code in (401, 403) else ""
        raise InputError(f"{error.request.url} answered {error.response.status_code}{hint}") from None
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise InputError(
            f"{url} does not answer ({error}); start the server, or give its address, such as http://localhost:8000"
        ) from None
    except (KeyError, TypeError, ValueError):
        raise InputError(f"{url} is no OpenAI-compatible server: /v1/models does not list models") from None
    names = [entry["id"] for entry in models]
    chosen = model or names[0]
    if chosen not in names:
        raise InputError(f"{url} does not serve the model {chosen}; it serves {', '.join(names)}")
    entry = models[names.index(chosen)]
    held = precisions.json().get("data", []) if precisions.is_success else []
    return Server(
        url,
        chosen,
        entry.get("root") or "",
        entry.get("max_model_len"),
        version.json().get("version", "") if version.is_success else "",
        {one["id"]: one["average_bits"] for one in held},
    )


def _get(url: str, path: str) -> httpx.Response:
    return httpx.get(f"{url}{path}", headers=authorization(), timeout=PROBE_TIMEOUT_S).raise_for_status()


def authorization() -> dict[str, str]:
    """Headers with the server's key, if the environment has one."""
    key = os.environ.get(KEY_VARIABLE)
    return {"Authorization": f"Bearer {key}"} if key else {}
