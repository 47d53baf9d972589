"""Shared fakes: a replica, an ASGI application that records what it received, and a parent folder of small files."""

import asyncio
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import CollectorRegistry

from matgptq_vllm.core.manifest import Manifest
from matgptq_vllm.core.parent import ParentSpec
from matgptq_vllm.core.profile import Profile, profiles_to_json
from serve.control import Control
from serve.drain import Drain
from serve.metrics import PrecisionMetrics
from serve.middleware import PrecisionMiddleware
from serve.replica import Replica
from serve.request_ids import RequestPrecisions
from serve.settings import Settings
from serve.step_observer import StepObserver
from serve.tenant_reload import TenantReload

REPORT = {
    "profiles": ["2", "3", "4", "6", "8", "mix-3.0"],
    "default": "8",
    "max_width": 8,
    "slice_rule": "nested",
    "runner": "v1",
    "average_bits": {"2": 2.0, "3": 3.0, "4": 4.0, "6": 6.0, "8": 8.0, "mix-3.0": 3.0},
    "bytes_per_weight": {"2": 0.27, "3": 0.39, "4": 0.52, "6": 0.77, "8": 1.02, "mix-3.0": 0.39},
    "perplexity": {"2": 60.0, "8": 40.5},
    "profile_widths": {"2": 2, "3": 3, "4": 4, "6": 6, "8": 8, "mix-3.0": 4},
    "memory_budget": None,
    "memory_reason": None,
    "weight_bytes": {"2": 3000000, "3": 4000000, "4": 5000000, "6": 7000000, "8": 9000000},
    "held_max_width": 8,
    "growing": False,
    "growing_failed": None,
    "not_elastic": None,
    "code_bytes": 7000000,
    "other_bytes": 1000000,
    "scale_bytes": 109375,
    "steps": 5,
    "tokens": {"4": 17},
}


@dataclass
class Answer:
    """What a client got."""

    status: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    chunks: list[bytes] = field(default_factory=list)

    @property
    def error(self) -> dict[str, Any]:
        return json.loads(b"".join(self.chunks))["error"]


class InnerApp:
    """Records request bodies and headers, then answers in two chunks."""

    def __init__(self) -> None:
        self.bodies: list[bytes] = []
        self.scopes: list[dict] = []
        self.after_body: list[dict] = []
        self.status = 200
        self.behaviour: Callable[..., Any] | None = None

    @property
    def json(self) -> dict[str, Any]:
        return json.loads(self.bodies[-1])

    @property
    def headers(self) -> dict[str, str]:
        return {name.decode().lower(): value.decode("latin-1") for name, value in self.scopes[-1]["headers"]}

    async def __call__(self, scope, receive, send) -> None:
        self.scopes.append(scope)
        body = b""
        while True:
            message = await receive()
            body += message.get("body", b"")
            if not message.get("more_body", False):
                break
        self.bodies.append(body)
        if self.behaviour is not None:
            await self.behaviour(scope, receive, send)
            return
        await send({"type": "http.response.start", "status": self.status, "headers": [(b"content-type", b"text/plain")]})
        await send({"type": "http.response.body", "body": b"one", "more_body": True})
        await send({"type": "http.response.body", "body": b"two", "more_body": False})


class Harness:
    """The middleware around an InnerApp, called as an ASGI server would."""

    def __init__(self, settings: Settings | None = None, tenants: TenantReload | None = None) -> None:
        self.inner = InnerApp()
        self.registry = CollectorRegistry()
        self.metrics = PrecisionMetrics(self.registry)
        self.joined = RequestPrecisions()
        self.observer = StepObserver()
        settings = settings or Settings()
        self.control: Control | None = Control.of(Replica.from_reports([REPORT], ["tiny"]), settings, self.observer, tenants)
        self.ended: list[bool] = []
        self.drain = Drain(settings.drain_seconds, end=lambda: self.ended.append(True))
        self.app = PrecisionMiddleware(self.inner, lambda: self.control, settings, self.metrics, self.joined, self.drain)

    def call(
        self,
        body: bytes | Iterable[bytes] | dict = b"{}",
        headers: Iterable[tuple[bytes, bytes]] = (),
        path: str = "/v1/completions",
        method: str = "POST",
        root_path: str = "",
        disconnect_after: int | None = None,
        content_length: bool = True,
    ) -> Answer:
        """Send a request whose body comes in the given chunks; the client goes away after ``disconnect_after`` of them."""
        if isinstance(body, dict):
            body = json.dumps(body).encode()
        chunks = [body] if isinstance(body, bytes) else list(body)
        messages = [
            {"type": "http.request", "body": chunk, "more_body": index < len(chunks) - 1} for index, chunk in enumerate(chunks)
        ][:disconnect_after]
        raw = [(b"host", b"test"), *headers]
        if content_length:
            raw.append((b"content-length", str(sum(map(len, chunks))).encode()))
        scope = {"type": "http", "method": method, "path": path, "root_path": root_path, "headers": raw, "query_string": b""}
        answer = Answer()

        async def receive() -> dict:
            return messages.pop(0) if messages else {"type": "http.disconnect"}

        async def send(message: dict) -> None:
            if message["type"] == "http.response.start":
                answer.status = message["status"]
                answer.headers = {name.decode(): value.decode() for name, value in message["headers"]}
            else:
                answer.chunks.append(message.get("body", b""))

        asyncio.run(self.app(scope, receive, send))
        return answer

    def count(self, name: str, **labels: str) -> float:
        return self.registry.get_sample_value(name, labels) or 0.0


@pytest.fixture
def harness() -> Harness:
    return Harness()


@pytest.fixture
def make_harness() -> type[Harness]:
    return Harness


@pytest.fixture
def report() -> dict[str, Any]:
    return json.loads(json.dumps(REPORT))


@pytest.fixture
def parent_folder(tmp_path: Path) -> Path:
    """The small files of a parent with one mixed profile of width 4 at most and one of width 8."""
    folder = tmp_path / "parent"
    folder.mkdir()
    spec = ParentSpec()
    layers = {"model.layers.0.mlp.down_proj": (8, 128), "model.layers.0.self_attn.o_proj": (16, 128)}
    names = list(layers)
    profiles = [
        Profile("mix-3.0", {names[0]: 2, names[1]: 4}),
        Profile("mix-6.0", {names[0]: 4, names[1]: 8}),
    ]
    (folder / "matgptq_manifest.json").write_text(Manifest(spec, layers, {}).to_json())
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "quantization_config": spec.to_dict()}))
    (folder / "matgptq_profiles.json").write_text(profiles_to_json(profiles))
    return folder
