"""The files of deploy/monitoring and deploy/compose, as far as they can be checked without a server."""

import json
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models.dashboard import Dashboard

from serve.settings import Settings

ROOT = Path(__file__).resolve().parents[2]
MONITORING = ROOT / "deploy" / "monitoring"
COMPOSE = ROOT / "deploy" / "compose"
DASHBOARD = json.loads((MONITORING / "dashboards" / "matgptq.json").read_text())


def needs(program: str, package: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(shutil.which(program) is None, reason=f"Debian's package {package} is not installed")


def run(*command: str, **environment: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, cwd=COMPOSE, env={**os.environ, **environment})
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@needs("promtool", "prometheus")
def test_prometheus_accepts_the_configuration_and_the_alerts_fire_when_they_should() -> None:
    assert "SUCCESS: 2 rule files found" in run("promtool", "check", "config", str(MONITORING / "prometheus.yml"))
    run("promtool", "check", "rules", *(str(path) for path in (MONITORING / "rules").glob("*.yml")))
    run("promtool", "test", "rules", str(MONITORING / "rules_test.yml"))


def test_every_alert_is_tested_and_has_its_entry_in_the_runbook() -> None:
    alerts = [
        rule for group in yaml.safe_load((MONITORING / "rules/alerts.yml").read_text())["groups"] for rule in group["rules"]
    ]
    tests = yaml.safe_load((MONITORING / "rules_test.yml").read_text())["tests"]
    fired = {case["alertname"] for test in tests for case in test["alert_rule_test"] if case.get("exp_alerts")}
    quiet = {case["alertname"] for test in tests for case in test["alert_rule_test"] if not case.get("exp_alerts")}
    headings = re.findall(r"^#+ (.*)$", (ROOT / "docs/operating.md").read_text(), re.MULTILINE)
    for alert in alerts:
        assert alert["alert"] in fired & quiet
        page, _, anchor = alert["annotations"]["runbook"].partition("#")
        assert page == "docs/operating.md"
        assert anchor in [heading.lower().replace(" ", "-") for heading in headings]


def test_the_dashboard_is_one_by_grafanas_own_model() -> None:
    parsed = Dashboard.from_json(DASHBOARD)
    written = json.loads(json.dumps(parsed, cls=JSONEncoder))
    assert len(written["panels"]) == len(DASHBOARD["panels"])
    # The model drops what it does not know: every field that we wrote comes back.
    assert lost(DASHBOARD, written) == []
    boxes = [panel["gridPos"] for panel in DASHBOARD["panels"]]
    cells = [
        (x, y) for box in boxes for x in range(box["x"], box["x"] + box["w"]) for y in range(box["y"], box["y"] + box["h"])
    ]
    assert len(cells) == len(set(cells)), "panels overlap"


def lost(ours: Any, theirs: Any, path: str = "") -> list[str]:
    """Paths of what is in ``ours`` and not in ``theirs``."""
    if isinstance(ours, dict) and isinstance(theirs, dict):
        missing = [f"{path}/{key}" for key in ours if key not in theirs]
        return missing + [item for key in ours if key in theirs for item in lost(ours[key], theirs[key], f"{path}/{key}")]
    if isinstance(ours, list) and isinstance(theirs, list) and len(ours) == len(theirs):
        return [item for index, pair in enumerate(zip(ours, theirs, strict=True)) for item in lost(*pair, f"{path}/{index}")]
    return [] if ours == theirs else [path]


@pytest.fixture(scope="module")
def services() -> dict[str, Any]:
    """The services as Compose understands them, with all files and profiles, on the GPU."""
    files = ["-f", "compose.yaml", "-f", "gpu.yaml"]
    shown = run(
        "docker-compose", *files, "--profile", "proxy", "config", PARENT="/parents/llama", SERVE_ARGUMENTS="--max-width 4"
    )
    return yaml.safe_load(shown)["services"]


@needs("docker-compose", "docker-compose")
def test_compose_understands_the_files(services: dict[str, Any]) -> None:
    assert set(services) == {"server", "prometheus", "grafana", "proxy"}
    assert services["server"]["command"] == "serve /parent --host 0.0.0.0 --max-width 4"
    assert services["server"]["deploy"]["resources"]["reservations"]["devices"][0]["capabilities"] == ["gpu"]
    for file in (services["server"]["build"]["dockerfile"],):
        assert (ROOT / file).is_file()
    cpu = yaml.safe_load(run("docker-compose", "config", PARENT="/parents/llama"))["services"]
    assert "deploy" not in cpu["server"]
    assert "proxy" not in cpu or cpu["proxy"]["profiles"] == ["proxy"]


@needs("docker-compose", "docker-compose")
def test_no_service_may_do_more_than_it_must(services: dict[str, Any]) -> None:
    for name, service in services.items():
        assert service["read_only"] is True
        assert service["cap_drop"] == ["ALL"]
        assert service["security_opt"] == ["no-new-privileges:true"]
        assert not service.get("privileged")
        assert re.fullmatch(r"[a-z/-]+:[a-z0-9.]+", service["image"])
        assert "latest" not in service["image"]
        for port in service["ports"]:
            assert name == "proxy" or str(port).startswith("127.0.0.1:")
        for volume in service.get("volumes", []):
            source = volume.split(":")[0]
            if source.startswith("/") and source != "/parents/llama":
                assert Path(source).exists()
                assert volume.endswith(":ro")
    assert services["server"]["environment"] == {"MATGPTQ_ADMIN_KEY": None, "VLLM_API_KEY": None}
    assert int(services["server"]["stop_grace_period"].rstrip("s")) > Settings.drain_seconds


def test_grafana_finds_its_data_and_its_dashboards() -> None:
    compose = yaml.safe_load((COMPOSE / "compose.yaml").read_text())["services"]
    (provider,) = yaml.safe_load((COMPOSE / "grafana/dashboards/matgptq.yaml").read_text())["providers"]
    mounted = {volume.split(":")[1]: volume.split(":")[0] for volume in compose["grafana"]["volumes"]}
    assert (COMPOSE / mounted[provider["options"]["path"]] / "matgptq.json").is_file()
    (source,) = yaml.safe_load((COMPOSE / "grafana/datasources/prometheus.yaml").read_text())["datasources"]
    assert source["url"] == "http://prometheus:9090"
    (scrape,) = yaml.safe_load((MONITORING / "prometheus.yml").read_text())["scrape_configs"]
    assert scrape["static_configs"][0]["targets"] == ["server:8000"]
