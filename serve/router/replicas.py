"""What the replicas behind a router hold, as they say themselves."""

import http.client
import json
import os
import re
import urllib.error
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from matgptq_vllm.core.errors import InputError

KEY_VARIABLE = "OPENAI_API_KEY"
"""Environment variable with a key that the replicas accept, if they want one."""

TIMEOUT_S = 30


@dataclass(frozen=True)
class RoutedReplica:
    """One server behind the router."""

    name: str
    address: str
    """HOST:PORT."""
    precisions: tuple[str, ...]
    """Names of the profiles that it holds."""
    width: float
    """Average bits of the widest of them."""
    fastest_ms: float | None
    """Time per token of the fastest of them for a request alone, as its latency model predicts; None: not known yet."""


@dataclass(frozen=True)
class ReplicaClass:
    """Replicas that hold the same precisions: any of them can answer what another can."""

    name: str
    members: tuple[RoutedReplica, ...]

    @property
    def precisions(self) -> tuple[str, ...]:
        return self.members[0].precisions

    @property
    def width(self) -> float:
        return self.members[0].width

    @property
    def fastest_ms(self) -> float | None:
        """None unless it is known of every member."""
        times = [member.fastest_ms for member in self.members]
        known = [time for time in times if time is not None]
        return min(known) if len(known) == len(times) else None


def parse_replica(text: str) -> tuple[str, str]:
    """Name and URL from ``NAME=URL``; InputError says what is wrong."""
    name, equals, url = text.partition("=")
    if not equals or not re.fullmatch(r"[A-Za-z0-9_.-]+", name):
        raise InputError(f"--replica {text!r} is not NAME=URL, such as wide=http://10.0.0.1:8000")
    parts = urlsplit(url)
    if parts.scheme != "http" or not parts.hostname or parts.path.strip("/") or parts.query:
        raise InputError(f"--replica {text!r}: the address must be http://HOST:PORT; encrypt between machines by other means")
    return name, f"http://{parts.hostname}:{parts.port or 80}"


def ask(name: str, url: str) -> RoutedReplica:
    """What the replica at ``url`` holds. InputError: it does not answer, or is no replica."""
    try:
        body = _get(f"{url}/v1/precisions")
    except urllib.error.HTTPError as error:
        hint = f"; put a key that it accepts into {KEY_VARIABLE}" if error.code in (401, 403) else ""
        raise InputError(f"replica {name}: {url}/v1/precisions answered {error.code}{hint}") from None
    except (OSError, ValueError, http.client.HTTPException) as error:
        raise InputError(
            f"replica {name}: {url} does not answer ({error}); start all replicas before writing the route"
        ) from None
    entries = body["data"]
    times = [entry["step_ms"]["1"] for entry in entries if entry["step_ms"]["1"] is not None]
    return RoutedReplica(
        name,
        url.removeprefix("http://"),
        tuple(entry["id"] for entry in entries),
        max(entry["average_bits"] for entry in entries),
        min(times, default=None),
    )


def classes_of(replicas: Sequence[RoutedReplica]) -> list[ReplicaClass]:
    """The replicas by what they hold, widest first. InputError: a name is there twice."""
    names = [replica.name for replica in replicas]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise InputError(f"--replica: the name {', '.join(twice)} is there twice; every replica has a name of its own")
    groups: dict[frozenset[str], list[RoutedReplica]] = {}
    for replica in replicas:
        groups.setdefault(frozenset(replica.precisions), []).append(replica)
    ordered = sorted(groups.values(), key=lambda members: -members[0].width)
    return [ReplicaClass(f"class{number}", tuple(members)) for number, members in enumerate(ordered)]


def _get(url: str) -> dict[str, Any]:
    key = os.environ.get(KEY_VARIABLE)
    request = urllib.request.Request(url, headers={"Authorization": f"Bearer {key}"} if key else {})
    with urllib.request.urlopen(request, timeout=TIMEOUT_S) as answer:
        found: dict[str, Any] = json.load(answer)
    return found
