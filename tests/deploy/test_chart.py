"""The Helm chart, rendered by Helm's own library and checked against Kubernetes' schemas."""

import json
import subprocess
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

import matgptq_vllm
from serve.cli import _own_parser
from serve.settings import Settings

helm = pytest.importorskip("helm_python", reason="Helm's library is published for x86_64 only")

ROOT = Path(__file__).resolve().parents[2]
CHART = ROOT / "deploy" / "helm" / "matgptq"
KUBERNETES = ("1.28", "1.34")
CUSTOM = {"ScaledObject", "ServiceMonitor", "PrometheusRule"}
"""Kinds that are not Kubernetes' own, so that it has no schema of them."""

EVERYTHING = {
    "autoscaling": {"kind": "keda"},
    "monitoring": {"serviceMonitor": True, "rules": True, "dashboard": True, "labels": {"release": "prometheus"}},
    "tenants": {"file": (ROOT / "examples" / "tenants.yaml").read_text()},
    "keysSecret": "keys",
    "replicaClasses": {
        "wide": {"host": "wide.example.org", "args": ["--tpot-slo-ms", "30"], "env": [{"name": "A", "value": "1"}]}
    },
}
FROM_HUB = {
    "model": {"existingClaim": "", "repository": "acme/parent", "revision": "main", "tokenSecret": "hub"},
    "autoscaling": {"kind": "hpa"},
}
BARE = {
    "model": {"copy": False},
    "networkPolicy": {"enabled": False},
    "podDisruptionBudget": {"enabled": False},
    "tenants": {"existingSecret": "mine"},
}


def render(values: dict[str, Any]) -> dict[tuple[str, str], dict[str, Any]]:
    """(kind, name) -> object, as `helm template prod CHART --namespace models` has it."""
    with helm.Chart.load(CHART) as chart:
        files = chart.render(values, name="prod", namespace="models")
    objects = [o for name, text in files.items() if name.endswith(".yaml") for o in yaml.safe_load_all(text) if o]
    assert len({(o["kind"], o["metadata"]["name"]) for o in objects}) == len(objects)
    return {(o["kind"], o["metadata"]["name"]): o for o in objects}


def server(objects: dict[tuple[str, str], Any], name: str) -> dict[str, Any]:
    return objects["Deployment", f"prod-matgptq-{name}"]["spec"]["template"]["spec"]


@pytest.mark.parametrize("version", KUBERNETES)
@pytest.mark.parametrize("values", [{}, EVERYTHING, FROM_HUB, BARE], ids=["defaults", "everything", "hub", "bare"])
def test_what_is_rendered_has_kubernetes_schema(values: dict[str, Any], version: str) -> None:
    objects = render(values)
    for (kind, _), rendered in objects.items():
        if kind not in CUSTOM:
            kubernetes_validate.validate(rendered, version, strict=True)
        assert rendered["metadata"]["labels"]["app.kubernetes.io/instance"] == "prod"
    assert {kind for kind, _ in objects} >= {"Deployment", "Service", "ServiceAccount"}


def test_the_chart_passes_helms_linter() -> None:
    for values in ({}, EVERYTHING, FROM_HUB, BARE):
        report = helm.lint(CHART, values, strict=True)
        assert report["errors"] == []
        assert [m for m in report["messages"] if m["severity"] > 1] == []


def test_two_narrow_replicas_and_a_wide_one_with_their_own_planes() -> None:
    objects = render({})
    narrow, wide = (objects["Deployment", f"prod-matgptq-{name}"]["spec"] for name in ("narrow", "wide"))
    assert (narrow["replicas"], wide["replicas"]) == (2, 1)
    for spec, width in ((narrow, 4), (wide, 8)):
        (fetch,), (container,) = spec["template"]["spec"]["initContainers"], spec["template"]["spec"]["containers"]
        assert fetch["args"] == ["fetch", "/source/parent", "--out=/parent/model", f"--max-width={width}"]
        own, rest = _own_parser().parse_known_args(container["args"][1:])
        assert own.max_width == width
        assert rest[:2] == ["/parent/model", "--host=0.0.0.0"]
    with_options = server(render(EVERYTHING), "wide")["containers"][0]["args"]
    own, _ = _own_parser().parse_known_args(with_options[1:])
    assert (own.tpot_slo_ms, own.tenants) == (30, "/etc/matgptq/tenants.yaml")


def test_a_pod_may_do_nothing_but_serve() -> None:
    for values in ({}, EVERYTHING, FROM_HUB, BARE):
        pod = server(render(values), "narrow")
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert pod["automountServiceAccountToken"] is False
        writable = {"/tmp", "/home/matgptq", "/dev/shm"}
        for container in [*pod.get("initContainers", []), *pod["containers"]]:
            security = container["securityContext"]
            assert security["readOnlyRootFilesystem"] is True
            assert security["allowPrivilegeEscalation"] is False
            assert security["capabilities"] == {"drop": ["ALL"]}
            mounted = {mount["mountPath"] for mount in container["volumeMounts"] if not mount.get("readOnly")}
            assert mounted <= writable | ({"/parent"} if container["name"] == "fetch" else set())
            assert {mount["name"] for mount in container["volumeMounts"]} <= {volume["name"] for volume in pod["volumes"]}


def test_probes_and_time_to_drain() -> None:
    pod = server(render({}), "wide")
    (container,) = pod["containers"]
    paths = {name: container[f"{name}Probe"]["httpGet"]["path"] for name in ("startup", "readiness", "liveness")}
    assert paths == {"startup": "/ready", "readiness": "/ready", "liveness": "/health"}
    own, _ = _own_parser().parse_known_args(container["args"][1:])
    assert own.drain_seconds > Settings.drain_seconds
    pre_stop = float(container["lifecycle"]["preStop"]["exec"]["command"][1])
    assert pod["terminationGracePeriodSeconds"] > own.drain_seconds + pre_stop


def test_secrets_are_referenced_and_never_written_into_a_pod() -> None:
    objects = render(EVERYTHING)
    assert objects["Secret", "prod-matgptq-tenants"]["stringData"]["tenants.yaml"].startswith("# Who may use a replica")
    text = json.dumps([o for (kind, _), o in objects.items() if kind == "Deployment"])
    assert "sha256:" not in text
    environment = {entry["name"]: entry for entry in server(objects, "wide")["containers"][0]["env"]}
    assert environment["MATGPTQ_ADMIN_KEY"]["valueFrom"]["secretKeyRef"]["name"] == "keys"
    hub = {entry["name"]: entry for entry in server(render(FROM_HUB), "wide")["initContainers"][0]["env"]}
    assert hub["HF_HUB_OFFLINE"]["value"] == "0"
    assert hub["HF_TOKEN"]["valueFrom"]["secretKeyRef"]["name"] == "hub"
    assert ("Secret", "prod-matgptq-tenants") not in render(BARE)


@pytest.mark.parametrize(("kind", "scaler"), [("keda", "ScaledObject"), ("hpa", "HorizontalPodAutoscaler")])
def test_autoscalers_ask_for_the_queue_and_the_missed_budgets_of_their_class(kind: str, scaler: str) -> None:
    objects = render({"autoscaling": {"kind": kind}})
    for name in ("narrow", "wide"):
        assert "replicas" not in objects["Deployment", f"prod-matgptq-{name}"]["spec"]
        spec = objects[scaler, f"prod-matgptq-{name}"]["spec"]
        assert spec["scaleTargetRef"]["name"] == f"prod-matgptq-{name}"
        text = json.dumps(spec)
        assert text.count(f"prod-matgptq-{name}") >= 3
        assert "waiting" in text
        assert "budget" in text
    if kind == "keda":
        metadata = [trigger["metadata"] for trigger in spec["triggers"]]
        assert all(set(entry) == {"serverAddress", "query", "threshold"} for entry in metadata)
        assert [trigger["type"] for trigger in spec["triggers"]] == ["prometheus", "prometheus"]


def test_rules_and_dashboard_are_those_of_deploy_monitoring(tmp_path: Path) -> None:
    objects = render(EVERYTHING)
    groups = objects["PrometheusRule", "prod-matgptq"]["spec"]["groups"]
    files = sorted((ROOT / "deploy/monitoring/rules").glob("*.yml"), reverse=True)
    assert groups == [group for file in files for group in yaml.safe_load(file.read_text())["groups"]]
    shown = objects["ConfigMap", "prod-matgptq-dashboard"]["data"]["matgptq.json"]
    assert json.loads(shown) == json.loads((ROOT / "deploy/monitoring/dashboards/matgptq.json").read_text())
    monitor = objects["ServiceMonitor", "prod-matgptq"]["spec"]
    labels = objects["Service", "prod-matgptq-wide"]["metadata"]["labels"]
    assert monitor["selector"]["matchLabels"].items() <= labels.items()
    assert monitor["endpoints"][0]["port"] == objects["Service", "prod-matgptq-wide"]["spec"]["ports"][0]["name"]


def test_a_selector_finds_the_pods_of_its_class_only() -> None:
    objects = render({})
    for name in ("narrow", "wide"):
        labels = objects["Deployment", f"prod-matgptq-{name}"]["spec"]["template"]["metadata"]["labels"]
        for kind in ("Service", "PodDisruptionBudget"):
            selector = objects[kind, f"prod-matgptq-{name}"]["spec"]["selector"]
            assert selector.get("matchLabels", selector).items() <= labels.items()
            assert selector.get("matchLabels", selector)["matgptq/class"] == name
    policy = objects["NetworkPolicy", "prod-matgptq"]["spec"]
    assert policy["egress"] == []
    assert {"protocol": "TCP", "port": 443} in render(FROM_HUB)["NetworkPolicy", "prod-matgptq"]["spec"]["egress"][0]["ports"]


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"replicaClasses": {"odd": {"maxWidth": 5}}}, "maxWidth"),
        ({"replicaClasses": {"Odd": {}}}, "Odd"),
        ({"model": {"existingClaim": ""}}, "model"),
        ({"model": {"repository": "acme/parent"}}, "model"),
        ({"autoscaling": {"kind": "magic"}}, "kind"),
        ({"modle": {}}, "modle"),
    ],
)
def test_wrong_values_are_refused(values: dict[str, Any], told: str) -> None:
    with helm.Chart.load(CHART) as chart, pytest.raises(helm.HelmError, match=told):
        chart.validate_schema(chart.merge_values(values))


def test_the_charts_version_is_the_projects() -> None:
    with helm.Chart.load(CHART) as chart:
        assert (chart.version, chart.metadata["appVersion"]) == (matgptq_vllm.__version__, matgptq_vllm.__version__)


def test_the_chart_can_be_packaged(tmp_path: Path) -> None:
    helm.package(CHART, destination=tmp_path)
    (archive,) = tmp_path.glob("*.tgz")
    listed = subprocess.run(["tar", "tzf", str(archive)], capture_output=True, text=True, check=True).stdout.split()
    assert "matgptq/files/recording.yml" in listed
