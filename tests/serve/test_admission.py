"""serve.admission through the middleware: precisions, budgets, tenants and quotas of one request."""

import json
from pathlib import Path

import pytest

from matgptq_vllm.core.precision import GROUP_KEY
from serve.api_keys import digest_of
from serve.load import StepLoad
from serve.settings import Settings
from serve.tenant_reload import TenantReload

KEYS = {name: f"key-of-tenant-{name}" for name in ("chat", "batch", "small", "busy")}

TENANTS = f"""
tenants:
  chat:
    keys: [{digest_of(KEYS["chat"])}]
    default_precision: auto
    auto_floor: 3
  batch:
    keys: [{digest_of(KEYS["batch"])}]
    default_precision: 2
    allowed_precisions: [2, 3]
  small:
    keys: [{digest_of(KEYS["small"])}]
    tokens_per_minute: 100
  busy:
    keys: [{digest_of(KEYS["busy"])}]
    max_concurrent_requests: 1
"""


def learned(harness, ms_per_bit: float = 5.0):
    """The harness whose model knows that a step takes so many milliseconds per bit, whatever its size."""
    model = harness.control.model
    for _ in range(40):
        for name in model.profiles:
            for batch in (1, 8, 32):
                model.observe([StepLoad({name: batch}, {}, 10)], ms_per_bit * harness.control.replica.average_bits[name])
    return harness


def told(answer) -> tuple[str, str]:
    return answer.headers["x-precision"], answer.headers["x-precision-reason"]


def budget(**values: float | str) -> list[tuple[bytes, bytes]]:
    names = {"tpot": b"X-Latency-Budget-Ms", "ttft": b"X-TTFT-Budget-Ms", "policy": b"X-Precision-Policy"}
    return [(names[key], str(value).encode()) for key, value in values.items()]


@pytest.fixture
def tenants(make_harness, tmp_path: Path):
    """A harness with the tenants above."""
    path = tmp_path / "tenants.yaml"
    path.write_text(TENANTS)
    return make_harness(tenants=TenantReload(path, interval_s=None))


def as_tenant(name: str) -> list[tuple[bytes, bytes]]:
    return [(b"authorization", f"Bearer {KEYS[name]}".encode())]


def test_a_budget_gets_the_widest_profile_that_is_predicted_to_meet_it(harness):
    learned(harness)
    assert told(harness.call(headers=budget(tpot=60))) == ("8", "budget")
    assert told(harness.call(headers=budget(tpot=26))) == ("4", "budget")
    assert harness.inner.json["vllm_xargs"] == {"precision": "4"}


def test_a_budget_that_nothing_meets_gets_the_narrowest_or_is_refused(harness):
    learned(harness)
    assert told(harness.call(headers=budget(tpot=2))) == ("2", "best-effort")
    answer = harness.call(headers=budget(tpot=2, policy="strict"))
    assert answer.status == 429
    assert int(answer.headers["retry-after"]) >= 1
    assert answer.error["type"] == "RateLimitError"
    assert "no precision is predicted to meet the budget" in answer.error["message"]
    assert len(harness.inner.bodies) == 1
    assert harness.count("matgptq_rejected_requests_total", reason="budget_unmet") == 1


def test_what_names_its_precision_is_never_degraded(harness):
    learned(harness)
    for headers in ([(b"x-precision", b"8")], [(b"x-precision", b"8"), *budget(tpot=1, policy="strict")]):
        assert told(harness.call(headers=headers)) == ("8", "header")
    assert told(harness.call({"model": "tiny@6"}, budget(tpot=1))) == ("6", "model")


def test_auto_aims_at_the_replicas_slo_and_keeps_to_its_floor(make_harness):
    harness = learned(make_harness(Settings(tpot_slo_ms=26, auto_floor="3")))
    assert told(harness.call({"precision": "auto"})) == ("4", "budget")
    assert told(harness.call()) == ("8", "default")
    assert told(harness.call({"precision": "auto"}, budget(tpot=2))) == ("3", "best-effort")


def test_requests_that_name_nothing_are_auto_if_the_operator_says_so(make_harness):
    harness = learned(make_harness(Settings(tpot_slo_ms=26, default_auto=True)))
    assert told(harness.call()) == ("4", "budget")


def test_auto_without_anything_to_aim_at_is_the_default(harness):
    assert told(harness.call({"precision": "auto"})) == ("8", "auto")


def test_decisions_are_remembered_for_people(harness):
    learned(harness)
    harness.call(headers=budget(tpot=26))
    decision = harness.control.to_json(None)["decisions"][-1]
    assert (decision["precision"], decision["reason"], decision["budget_tpot_ms"]) == ("4", "budget", 26.0)
    assert decision["predicted_tpot_ms"] == pytest.approx(20, rel=0.2)


def test_keys_are_needed_where_there_are_tenants(tenants):
    for headers in ([], [(b"authorization", b"Bearer wrong-key-of-nobody")], [*as_tenant("chat"), *as_tenant("batch")]):
        answer = tenants.call(headers=headers)
        assert answer.status == 401
        assert answer.error["type"] == "AuthenticationError"
        assert "key-of" not in answer.error["message"]
    assert tenants.call(path="/v1/models", method="GET").status == 401
    assert tenants.call(path="/v1/models", method="GET", headers=as_tenant("chat")).status == 200
    assert tenants.call(path="/health", method="GET").status == 200
    assert tenants.inner.bodies == [b"{}", b"{}"]


def test_a_tenant_has_its_own_default_and_floor(tenants):
    learned(tenants)
    assert told(tenants.call(headers=as_tenant("batch"))) == ("2", "tenant")
    assert told(tenants.call(headers=[*as_tenant("chat"), *budget(tpot=2)])) == ("3", "best-effort")
    assert told(tenants.call(headers=as_tenant("chat"))) == ("8", "auto")
    assert told(tenants.call({"precision": "auto"}, headers=[*as_tenant("batch"), *budget(tpot=100)])) == ("3", "budget")
    assert tenants.count("matgptq_tenant_requests_total", tenant="batch", precision="2") == 1


def test_a_tenant_may_use_what_it_is_allowed(tenants):
    answer = tenants.call({"precision": 8}, as_tenant("batch"))
    assert (answer.status, answer.error["type"]) == (403, "PermissionDeniedError")
    assert "ask for one of 2, 3, auto" in answer.error["message"]
    assert tenants.count("matgptq_tenant_rejected_requests_total", tenant="batch", reason="tenant") == 1


def test_quotas_hold_and_say_when_to_come_again(tenants):
    assert tenants.call({"prompt": "x", "max_tokens": 60}, as_tenant("small")).status == 200
    answer = tenants.call({"prompt": "x", "max_tokens": 60}, as_tenant("small"))
    assert answer.status == 429
    assert 1 <= int(answer.headers["retry-after"]) <= 60
    assert tenants.call({"prompt": "x", "max_tokens": 6000}, as_tenant("small")).headers.get("retry-after") is None


def test_a_place_is_free_again_however_the_request_ends(tenants):
    async def fails(scope, receive, send):
        raise RuntimeError("engine")

    tenants.inner.behaviour = fails
    with pytest.raises(RuntimeError):
        tenants.call(headers=as_tenant("busy"))
    tenants.inner.behaviour = None
    assert tenants.call(headers=as_tenant("busy")).status == 200
    assert tenants.call(headers=as_tenant("busy"), disconnect_after=0).status == 0
    assert tenants.call(headers=as_tenant("busy")).status == 200
    assert tenants.control.tracker.load().running == {}


def test_what_vllm_refuses_uses_up_no_tokens(tenants):
    tenants.inner.status = 400
    for _ in range(3):
        assert tenants.call({"prompt": "x", "max_tokens": 60}, as_tenant("small")).status == 400
    tenants.inner.status = 200
    assert tenants.call({"prompt": "x", "max_tokens": 60}, as_tenant("small")).status == 200


@pytest.mark.parametrize(
    ("document", "tokens"),
    [
        ({"max_tokens": 50}, 50),
        ({"max_tokens": 50, "n": 2}, 100),
        ({"max_completion_tokens": 20, "prompt": ["a", "b"]}, 40),
        ({"max_tokens": True, "prompt": [1, 2]}, 256),
        ({"max_tokens": -1}, 256),
    ],
)
def test_a_request_is_measured_before_it_is_tokenized(document, tokens):
    from serve.request_body import RequestBody

    size = RequestBody.parse(json.dumps(document).encode()).size(40)
    assert size.prompt_tokens == 10
    assert size.sequences * (256 if size.max_tokens is None else size.max_tokens) == tokens


def test_a_quota_that_refuses_leaves_no_trace_in_the_load_or_in_the_decisions(tenants, monkeypatch):
    learned(tenants)
    arrived: list[int] = []
    monkeypatch.setattr(tenants.control.admission._controller, "arrived", arrived.append)
    refused = tenants.call({"prompt": "x", "max_tokens": 1000}, [*as_tenant("small"), *budget(tpot=26)])
    assert refused.status == 429
    assert arrived == []
    assert not tenants.control.to_json(None)["decisions"]
    assert not tenants.control.tracker.load().running


def test_a_budget_that_is_refused_gives_the_quota_back(tenants):
    learned(tenants)
    for _ in range(3):
        answer = tenants.call({"prompt": "x"}, [*as_tenant("busy"), *budget(tpot=2, policy="strict")])
        assert (answer.status, "no precision" in answer.error["message"]) == (429, True)
    assert tenants.call({"prompt": "x"}, as_tenant("busy")).status == 200


def test_only_auto_requests_follow_and_only_where_the_operator_says_so(harness, make_harness):
    learned(harness).call(headers=budget(tpot=60))
    assert GROUP_KEY not in harness.inner.json["vllm_xargs"]
    elastic = learned(make_harness(Settings(elastic_running=True)))
    elastic.call(headers=budget(tpot=60))
    group = elastic.inner.json["vllm_xargs"][GROUP_KEY]
    assert group
    elastic.call(headers=[(b"x-precision", b"8"), *budget(tpot=60)])
    assert elastic.inner.json["vllm_xargs"] == {"precision": "8"}
    elastic.call({"precision": "auto"})  # nothing to aim at
    assert elastic.inner.json["vllm_xargs"] == {"precision": "8"}


def test_a_client_cannot_join_a_group(make_harness):
    harness = make_harness(Settings(elastic_running=True))
    for value in ("g", "", 1):
        answer = harness.call({"vllm_xargs": {GROUP_KEY: value, "precision": "8"}})
        assert (answer.status, answer.error["param"]) == (400, f"vllm_xargs.{GROUP_KEY}")
    twice = b'{"vllm_xargs": {"precision_group": null, "precision_group": "g"}}'
    assert harness.call(twice).status == 400
    assert not harness.inner.bodies
