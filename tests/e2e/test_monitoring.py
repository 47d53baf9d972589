"""A real Prometheus scrapes a real server: every rule, every query of the dashboard and those of the autoscaler have data, and
nginx in front passes what it should. A real OTLP receiver gets the server's spans."""

import json
import math
import re
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from serve.api_keys import digest_of, new_key

from .otlp_receiver import OtlpReceiver, attributes, otlp_receiver
from .replica_server import MODEL_NAME, ReplicaServer, free_port

helm = pytest.importorskip("helm_python", reason="Helm's library is published for x86_64 only")

pytestmark = [
    pytest.mark.engine,
    pytest.mark.skipif(
        shutil.which("prometheus") is None or shutil.which("nginx") is None,
        reason="Debian's packages prometheus and nginx are not installed",
    ),
]

ROOT = Path(__file__).resolve().parents[2]
DEPLOY = ROOT / "deploy"
DASHBOARD = json.loads((DEPLOY / "monitoring" / "dashboards" / "matgptq.json").read_text())
DEADLINE_S = 90
KEY = new_key()


def prepared(query: str) -> str:
    """``query`` as Grafana sends it, with all jobs chosen."""
    return query.replace("$job", ".*").replace("$__rate_interval", "1m")


@pytest.fixture(scope="module")
def receiver() -> Iterator[OtlpReceiver]:
    with otlp_receiver() as running:
        yield running


@pytest.fixture(scope="module")
def server(parent_dir: Path, receiver: OtlpReceiver, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ReplicaServer]:
    """A server with one tenant, whose ``auto`` requests have a budget."""
    folder = tmp_path_factory.mktemp("monitored")
    tenants = folder / "tenants.yaml"
    tenants.write_text(yaml.safe_dump({"tenants": {"acme": {"keys": [digest_of(KEY)]}}}))
    arguments = ["--tenants", str(tenants), "--default-precision", "auto", "--tpot-slo-ms", "200"]
    arguments += ["--otlp-traces-endpoint", receiver.url]
    with ReplicaServer(parent_dir, folder / "server.log", arguments) as running:
        yield running


@pytest.fixture(scope="module")
def prometheus(server: ReplicaServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Address of a Prometheus with the project's configuration, but another target and a shorter interval."""
    folder = tmp_path_factory.mktemp("prometheus")
    shutil.copytree(DEPLOY / "monitoring" / "rules", folder / "rules")
    config = yaml.safe_load((DEPLOY / "monitoring" / "prometheus.yml").read_text())
    config["global"] = {"scrape_interval": "1s", "evaluation_interval": "1s"}
    config["scrape_configs"][0]["static_configs"][0]["targets"] = [server.url.removeprefix("http://")]
    (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
    address = f"127.0.0.1:{free_port()}"
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(
            [
                "prometheus",
                f"--config.file={folder / 'prometheus.yml'}",
                f"--storage.tsdb.path={folder / 'data'}",
                f"--web.listen-address={address}",
            ],
            stdout=log,
            stderr=subprocess.STDOUT,
        )
    yield f"http://{address}"
    process.terminate()
    process.wait(30)


def traffic(server: ReplicaServer) -> None:
    """Requests that give every metric something to say."""
    body = {"model": MODEL_NAME, "prompt": "The old man looked at the sea and", "max_tokens": 8}
    with server.client({"Authorization": f"Bearer {KEY}"}) as client:
        for headers in ({}, {"X-Precision": "3"}, {"X-Latency-Budget-Ms": "500"}, {"X-Latency-Budget-Ms": "0.01"}):
            assert client.post("/v1/completions", json=body, headers=headers).status_code == 200
        assert client.post("/v1/completions", json={**body, "max_tokens": 10**6}).status_code == 400
        assert client.post("/v1/completions", json=body, headers={"X-Precision": "99"}).status_code == 400


def values(prometheus: str, query: str) -> list[float]:
    """Values of ``query`` now, as far as they are numbers."""
    answer = httpx.get(f"{prometheus}/api/v1/query", params={"query": query}, timeout=10).json()
    assert answer["status"] == "success", (query, answer)
    found = [float(sample["value"][1]) for sample in answer["data"]["result"]]
    return [value for value in found if math.isfinite(value)]


def wait_for_data(server: ReplicaServer, prometheus: str, queries: list[str]) -> list[str]:
    """Make traffic until every query has data; returns those that have none."""
    deadline = time.monotonic() + DEADLINE_S
    empty = queries
    while empty and time.monotonic() < deadline:
        traffic(server)
        time.sleep(2)
        try:
            empty = [query for query in empty if not values(prometheus, query)]
        except httpx.TransportError:
            continue  # Prometheus is starting
    return empty


def test_every_query_of_the_dashboard_has_data(server: ReplicaServer, prometheus: str) -> None:
    panels = [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]
    queries = [prepared(target["expr"]) for panel in panels for target in panel["targets"]]
    assert len(queries) >= len(panels) > 20
    assert wait_for_data(server, prometheus, queries) == []
    names = httpx.get(f"{prometheus}/api/v1/label/job/values").json()["data"]
    assert names == ["matgptq"]


def test_every_recording_rule_has_data_and_the_budgets_add_up(server: ReplicaServer, prometheus: str) -> None:
    groups = yaml.safe_load((DEPLOY / "monitoring" / "rules" / "recording.yml").read_text())["groups"]
    names = [rule["record"] for group in groups for rule in group["rules"]]
    assert wait_for_data(server, prometheus, names) == []
    shares = values(prometheus, "job_precision:matgptq_generation_tokens:share5m")
    assert sum(shares) == pytest.approx(1)
    (misses,) = values(prometheus, 'job_budget:matgptq_budget_misses:ratio5m{budget="tpot"}')
    assert 0 < misses < 1  # some budgets can be met, one cannot


def test_the_alerts_are_known_and_none_fails(server: ReplicaServer, prometheus: str) -> None:
    assert wait_for_data(server, prometheus, ["up"]) == []
    groups = httpx.get(f"{prometheus}/api/v1/rules").json()["data"]["groups"]
    rules = [rule for group in groups for rule in group["rules"]]
    assert {rule["health"] for rule in rules} == {"ok"}
    assert {rule["name"] for rule in rules if rule["type"] == "alerting"} >= {"MatGPTQReplicaDown", "MatGPTQBudgetMisses"}
    # The alerts of what is absent here would never fire: the metrics that they compare do exist.
    for rule in rules:
        if rule["type"] == "alerting":
            compared = re.split(r" (?:==|>) [0-9.]+$", rule["query"])[0]
            assert values(prometheus, compared), rule["name"]


def test_the_autoscalers_queries_have_data(server: ReplicaServer, prometheus: str) -> None:
    with helm.Chart.load(DEPLOY / "helm" / "matgptq") as chart:
        files = chart.render({"autoscaling": {"kind": "keda"}}, name="prod", namespace="models")
    objects = list(yaml.safe_load_all(files["matgptq/templates/autoscaling.yaml"]))
    queries = [trigger["metadata"]["query"] for o in objects if o for trigger in o["spec"]["triggers"]]
    assert len(queries) == 4
    # The labels of a cluster; without them the same query speaks of this server.
    here = [re.sub(r'namespace="models", service="[a-z-]+"(, )?', "", query) for query in queries]
    assert wait_for_data(server, prometheus, here) == []
    for query in queries:
        # In a cluster that has no such Pod: no queue, and no share of budgets missed rather than none at all.
        assert values(prometheus, query) == ([0.0] if "budget" in query else [])


def test_a_receiver_gets_the_span_of_a_request_with_its_precision_around_vllms_own(
    server: ReplicaServer, receiver: OtlpReceiver
) -> None:
    trace_id, client_span = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
    body = {"model": MODEL_NAME, "prompt": "The sea", "max_tokens": 4}
    headers = {"Authorization": f"Bearer {KEY}", "traceparent": f"00-{trace_id}-{client_span}-01", "X-Precision": "3"}
    with server.client(headers) as client:
        assert client.post("/v1/completions", json=body).status_code == 200
    deadline = time.monotonic() + DEADLINE_S  # spans are sent in batches
    while len(found := receiver.spans(trace_id)) < 2 and time.monotonic() < deadline:
        time.sleep(0.2)
    ours, theirs = found["POST /v1/completions"], found["llm_request"]
    assert (ours.parent_span_id.hex(), theirs.parent_span_id) == (client_span, ours.span_id)
    told = attributes(ours)
    assert (told["matgptq.precision"], told["matgptq.precision.reason"], told["matgptq.tenant"]) == ("3", "header", "acme")
    assert told["http.response.status_code"] == 200
    assert ours.start_time_unix_nano < theirs.start_time_unix_nano < ours.end_time_unix_nano


def test_nginx_passes_the_api_as_a_stream_and_nothing_else(server: ReplicaServer, tmp_path: Path) -> None:
    port = free_port()
    text = (DEPLOY / "compose" / "nginx.conf").read_text()
    text = text.replace("server server:8000;", f"server {server.url.removeprefix('http://')};")
    text = text.replace("listen 8080;", f"listen 127.0.0.1:{port};").replace("/tmp/", f"{tmp_path}/")
    (tmp_path / "nginx.conf").write_text(text)
    process = subprocess.Popen(["nginx", "-c", str(tmp_path / "nginx.conf"), "-p", str(tmp_path), "-g", "daemon off;"])
    try:
        with httpx.Client(
            base_url=f"http://127.0.0.1:{port}", headers={"Authorization": f"Bearer {KEY}"}, timeout=60
        ) as client:
            deadline = time.monotonic() + 20
            while True:
                try:
                    statuses: dict[str, Any] = {path: client.get(path).status_code for path in ("/ready", "/metrics", "/docs")}
                    break
                except httpx.TransportError:
                    assert time.monotonic() < deadline
                    time.sleep(0.1)
            assert statuses == {"/ready": 200, "/metrics": 404, "/docs": 404}
            body = {"model": MODEL_NAME, "prompt": "The sea", "max_tokens": 40, "ignore_eos": True, "stream": True}
            arrivals = []
            with client.stream("POST", "/v1/completions", json=body, headers={"X-Precision": "4"}) as response:
                assert response.headers["x-precision"] == "4"
                arrivals = [time.monotonic() for line in response.iter_lines() if line.startswith("data: {")]
            assert len(arrivals) > 10  # a chunk may have several tokens
            assert len(set(arrivals)) > 1
            # Not in one piece at the end: half of the tokens came before the last tenth of the time.
            assert arrivals[len(arrivals) // 2] < arrivals[0] + 0.9 * (arrivals[-1] - arrivals[0])
    finally:
        process.terminate()
        process.wait(20)
