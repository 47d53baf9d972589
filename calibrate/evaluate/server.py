"""What a running server says about itself: the name of its model, its context, the precisions that it holds."""

import json
from dataclasses import dataclass
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.parse import urlsplit
from urllib.request import urlopen

from matgptq_vllm.core.errors import InputError
from matgptq_vllm.core.precision import AUTO

TIMEOUT_S = 30


@dataclass(frozen=True)
class ServerInfo:
    """A replica, seen from outside."""

    url: str
    """Without a path and a slash at the end."""
    model: str
    context: int
    """Tokens per request, prompt and answer together."""
    precisions: tuple[str, ...]
    """Names of its profiles."""

    def check_precision(self, name: str) -> None:
        """InputError unless a request may ask for ``name``; the message lists what there is."""
        if name != AUTO and name not in self.precisions:
            raise InputError(
                f"precision {name!r} is not held by the server at {self.url}; it holds {', '.join((*self.precisions, AUTO))}"
            )


def ask_server(url: str) -> ServerInfo:
    """Ask the server at ``url`` (``http://host:port``, with or without ``/v1``); InputError if it is no replica of ours."""
    if urlsplit(url).scheme not in ("http", "https"):
        raise InputError(f"--url {url!r} is not an address; give one like http://127.0.0.1:8000")
    base = url.rstrip("/").removesuffix("/v1")
    try:
        model = _get(f"{base}/v1/models")["data"][0]
        precisions = tuple(profile["id"] for profile in _get(f"{base}/v1/precisions")["data"])
        return ServerInfo(base, model["id"], int(model["max_model_len"]), precisions)
    except HTTPError as error:
        raise InputError(f"{error.url} answered {error.code}; give --url the address of a `matgptq serve`") from error
    except (URLError, TimeoutError, ConnectionError) as error:
        raise InputError(f"no server answers at {base} ({error}); start one with `matgptq serve DIR`") from error
    except (ValueError, KeyError, IndexError, TypeError) as error:
        raise InputError(f"{base} is not a MatGPTQ replica ({error!r}); give --url the address of a `matgptq serve`") from error


def _get(url: str) -> Any:
    with urlopen(url, timeout=TIMEOUT_S) as response:
        return json.load(response)
