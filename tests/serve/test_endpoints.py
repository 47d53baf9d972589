"""The endpoint plugin in a FastAPI application, with an engine that only answers the replica call."""

import asyncio
from argparse import Namespace

import pytest
from fastapi import FastAPI, Request
from prometheus_client import CollectorRegistry
from starlette.middleware.base import BaseHTTPMiddleware
from starlette.responses import JSONResponse
from starlette.testclient import TestClient
from vllm.plugins.endpoint_plugins.interface import EndpointPlugin

from matgptq_vllm.core.errors import UnsupportedError
from serve.command import WORKER_CLASS
from serve.endpoints import PrecisionEndpoints, served_names
from serve.metrics import PrecisionMetrics
from serve.replica import LiveReports, Replica
from serve.request_ids import RequestPrecisions
from serve.settings import Settings
from serve.step_observer import StepObserver


class Engine:
    """Answers collective_rpc as vLLM's client does."""

    def __init__(self, reports, delay_s: float = 0.0):
        self.reports = reports
        self.delay_s = delay_s
        self.num_calls = 0

    async def collective_rpc(self, method, timeout=None, args=(), kwargs=None):
        assert method == "matgptq_replica"
        self.num_calls += 1
        await asyncio.sleep(self.delay_s)
        if isinstance(self.reports, Exception):
            raise self.reports
        return self.reports


def make_app(engine, worker_cls=WORKER_CLASS, names=("tiny", "tiny@4"), rpc_timeout_ms=2000, cache="none"):
    registry = CollectorRegistry()
    settings = Settings(
        rpc_timeout_ms=rpc_timeout_ms, sweep_seconds=0, latency_cache=str(cache), admin_key="secret-of-the-admin"
    )
    plugin = PrecisionEndpoints(settings, PrecisionMetrics(registry), RequestPrecisions(), StepObserver())
    app = FastAPI()

    @app.post("/v1/completions")
    async def completions(request: Request):
        return {"got": await request.json()}

    plugin.attach_router(app)
    args = Namespace(served_model_name=list(names) if names else None, model="dir", worker_cls=worker_cls)
    asyncio.run(plugin.init_state(engine, app.state, args))
    return app, registry


def test_it_is_what_vllm_takes_for_an_endpoint_plugin():
    plugin = PrecisionEndpoints(Settings(), PrecisionMetrics(CollectorRegistry()), RequestPrecisions())
    assert isinstance(plugin, EndpointPlugin)
    assert plugin.required_tasks == ("generate",)


def test_precisions_are_listed_with_live_numbers(report):
    app, registry = make_app(Engine([report]))
    report["steps"] = 99
    document = TestClient(app).get("/v1/precisions").json()
    assert document["default"] == "8"
    assert (document["max_width"], document["slice_rule"]) == (8, "nested")
    assert [entry["id"] for entry in document["data"]] == report["profiles"]
    entry = document["data"][2]
    assert entry == {
        "id": "4",
        "object": "precision",
        "default": False,
        "average_bits": 4.0,
        "bytes_per_weight": 0.52,
        "perplexity": None,
        "models": ["tiny@4"],
        "step_ms": {"1": None, "8": None, "32": None},
    }
    assert document["load"] == {"running": {}, "waiting": 0, "context_tokens": 0, "kv_cache_usage": None}
    coefficients = document["latency_model"].pop("coefficients")
    assert document["latency_model"] == {"source": "none", "observations": 0, "mean_error": None}
    assert (coefficients["base"], coefficients["fixed"]["4"]) == (0.0, 0.0)
    assert (document["slo"], document["decisions"]) == ({"tpot_ms": None, "ttft_ms": None, "auto_floor": None}, [])
    assert document["workers"] == [
        {
            "runner": "v1",
            "code_bytes": 7000000,
            "scale_bytes": 109375,
            "other_bytes": 1000000,
            "steps": 99,
            "tokens": {"4": 17},
        }
    ]
    labels = {"default_precision": "8", "max_width": "8", "slice_rule": "nested"}
    assert registry.get_sample_value("matgptq_replica_info", labels) == 1


def test_a_busy_engine_does_not_hold_up_the_list(report):
    engine = Engine([report])
    app, _ = make_app(engine, rpc_timeout_ms=20)
    engine.delay_s = 5.0
    document = TestClient(app).get("/v1/precisions").json()
    assert document["workers"] is None
    assert [entry["id"] for entry in document["data"]] == report["profiles"]


def test_generation_requests_go_through_the_middleware(report):
    app, registry = make_app(Engine([report]))
    client = TestClient(app)
    answer = client.post("/v1/completions", json={"model": "tiny@4", "prompt": "x"})
    assert answer.headers["x-precision"] == "4"
    assert answer.json() == {"got": {"model": "tiny", "prompt": "x", "vllm_xargs": {"precision": "4"}}}
    assert client.post("/v1/completions", content=b"no").status_code == 400
    assert registry.get_sample_value("matgptq_rejected_requests_total", {"reason": "body"}) == 1


def test_middleware_added_later_is_outside_so_authentication_comes_first(report):
    app, registry = make_app(Engine([report]))

    async def refuse(request, call_next):
        return JSONResponse({"error": "Unauthorized"}, status_code=401)

    app.add_middleware(BaseHTTPMiddleware, dispatch=refuse)
    answer = TestClient(app).post("/v1/completions", content=b"no", headers={"x-precision": "nonsense"})
    assert answer.status_code == 401
    assert registry.get_sample_value("matgptq_rejected_requests_total", {"reason": "header"}) is None


def test_an_engine_of_another_model_is_left_alone(report):
    app, _ = make_app(Engine(Exception("no such method")), worker_cls="auto")
    client = TestClient(app)
    assert client.post("/v1/completions", json={"prompt": "x"}).json() == {"got": {"prompt": "x"}}
    assert client.post("/v1/completions", json={}, headers={"X-Precision": "4"}).status_code == 400
    answer = client.get("/v1/precisions")
    assert (answer.status_code, answer.json()["error"]["type"]) == (501, "NotImplementedError")


def test_a_replica_that_cannot_answer_stops_the_start():
    with pytest.raises(RuntimeError, match="dead"):
        make_app(Engine(RuntimeError("dead")))


def test_a_server_without_an_engine_starts():
    app, _ = make_app(None)
    assert TestClient(app).get("/v1/precisions").status_code == 501


def test_served_names_are_vllms():
    assert served_names(Namespace(served_model_name=["a", "b"], model="m")) == ["a", "b"]
    assert served_names(Namespace(served_model_name=None, model="m")) == ["m"]
    assert served_names(Namespace(served_model_name="a", model="m")) == ["a"]


@pytest.mark.parametrize("change", [{"profiles": ["8"]}, {"max_width": 4}, {"slice_rule": "round"}, {"default": "4"}])
def test_workers_that_hold_different_things_are_refused(report, change):
    with pytest.raises(UnsupportedError, match="same profiles"):
        Replica.from_reports([report, {**report, **change}], ["tiny"])


@pytest.mark.parametrize("missing", ["profiles", "default", "max_width", "slice_rule", "average_bits", "bytes_per_weight"])
def test_a_damaged_report_is_refused(report, missing):
    del report[missing]
    with pytest.raises(UnsupportedError, match=missing):
        Replica.from_reports([report], ["tiny"])


def test_no_worker_at_all_is_refused():
    with pytest.raises(UnsupportedError):
        Replica.from_reports([], ["tiny"])


def test_many_clients_cost_the_engine_one_call(report):
    engine = Engine([report], delay_s=0.05)

    async def ask():
        live = LiveReports(lambda: engine.collective_rpc("matgptq_replica"), timeout_s=2.0)
        together = await asyncio.gather(*(live.get() for _ in range(20)))
        after = await live.get()
        return [*together, after]

    assert asyncio.run(ask()) == [[report]] * 21
    assert engine.num_calls == 2


def test_a_late_answer_is_not_lost_to_the_next_client(report):
    engine = Engine([report], delay_s=0.1)

    async def ask():
        live = LiveReports(lambda: engine.collective_rpc("matgptq_replica"), timeout_s=0.01)
        first = await live.get()
        await asyncio.sleep(0.08)
        live._timeout_s = 2.0
        return first, await live.get()

    assert asyncio.run(ask()) == (None, [report])
    assert engine.num_calls == 1
