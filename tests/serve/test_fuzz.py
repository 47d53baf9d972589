"""Whatever a client sends, headers and body together: an answer in OpenAI's shape, nothing leaked, no slot kept.

The middleware stands before an application that records what it gets; there are tenants, and the latency model has learned.
"""

import json
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st

from serve.api_keys import digest_of
from serve.load import StepLoad
from serve.middleware import GENERATION_PATHS
from serve.selection import REASONS
from serve.settings import Settings
from serve.tenant_reload import TenantReload

PROFILES = ("2", "3", "4", "6", "8", "mix-3.0")
OPEN, NARROW, BOUNDED = "sk-open-key-0123456789", "sk-narrow-key-0123456789", "sk-bounded-key-0123456789"
ALLOWED = {OPEN: PROFILES, NARROW: ("3", "mix-3.0"), BOUNDED: PROFILES}

SECRET = "xylophonic"
"""In the body and in a header of every request. No answer may have it: one quotes the selector at fault, and nothing else."""

FUZZ = settings(
    max_examples=250, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)


@pytest.fixture
def guarded(make_harness, tmp_path: Path):
    """A server with tenants, small bounds, an SLO, and step times that grow with the width."""
    file = tmp_path / "tenants.yaml"
    file.write_text(
        f"""tenants:
  open: {{keys: ["{digest_of(OPEN)}"]}}
  narrow: {{keys: ["{digest_of(NARROW)}"], default_precision: auto, allowed_precisions: [3, mix-3.0]}}
  bounded: {{keys: ["{digest_of(BOUNDED)}"], requests_per_minute: 1000000, tokens_per_minute: 100000000,
    max_concurrent_requests: 1}}
"""
    )
    harness = make_harness(
        Settings(max_body_bytes=20_000, max_header_bytes=4000, tpot_slo_ms=30.0, auto_floor="3"),
        TenantReload(file, interval_s=None),
    )
    model = harness.control.model
    for batch in (1, 4, 16):
        for profile, milliseconds in zip(model.profiles, (5, 6, 6, 8, 11, 14), strict=True):
            for _ in range(5):
                model.observe([StepLoad({profile: batch}, {}, 100 * batch)], milliseconds + batch / 4)
    return harness


def cased(name: str) -> st.SearchStrategy[bytes]:
    """A header name as clients and proxies may spell it."""
    return st.sampled_from([name.lower(), name, name.upper(), name.swapcase()]).map(str.encode)


PRECISIONS = st.sampled_from(
    [*PROFILES, "auto", "5", "AUTO", " 4 ", "4\r\nX-Precision: 8", "4, 8", "٤", "", "8\x00", "mix-3.0"]
)
NUMBERS = st.sampled_from(["30", "0.5", "1e3", "-1", "0", "nan", "inf", "9" * 300, "0.000000000001", "10000000", "३", "5;q=1"])
VALUES = st.one_of(
    PRECISIONS.map(str.encode),
    NUMBERS.map(str.encode),
    st.sampled_from([b"strict", b"best-effort", b"STRICT", b"\xff\xfe", b"x" * 3000, b"\r\n\r\n"]),
    st.binary(max_size=12),
)
NAMES = st.sampled_from(
    ["X-Precision", "X-Latency-Budget-Ms", "X-TTFT-Budget-Ms", "X-Precision-Policy", "X-Request-Id", "Content-Length", "Cookie"]
)
KEYS = st.sampled_from([OPEN, NARROW, BOUNDED])
CREDENTIALS = st.one_of(
    KEYS.map(lambda key: [(b"authorization", b"Bearer " + key.encode())]),
    KEYS.map(lambda key: [(b"X-Api-Key", key.encode())]),
)
HEADERS = st.lists(st.tuples(NAMES.flatmap(cased), VALUES), max_size=4)
"""Mostly right ones by chance would be rare: ``LIKELY`` has those."""
LIKELY = st.fixed_dictionaries(
    {},
    optional={
        b"x-precision": st.sampled_from([name.encode() for name in (*PROFILES, "auto")]),
        b"X-Latency-Budget-Ms": st.sampled_from([b"0.01", b"12.5", b"1000"]),
        b"X-TTFT-Budget-MS": st.sampled_from([b"0.01", b"500"]),
        b"x-precision-policy": st.sampled_from([b"strict", b"best-effort"]),
    },
).map(lambda found: list(found.items()))

SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(10**40), 10**40),
    st.floats(),
    st.sampled_from(["word", "4", "auto", "tiny@4", 10**4000, float("inf"), "\ud800", "a" * 5000]),
    st.text(max_size=8),
)
JSON = st.recursive(
    SCALARS, lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=4), inner, max_size=3))
)
FIELDS = {
    "precision": st.one_of(PRECISIONS, st.sampled_from([2, 4, 8, 5, True, 4.0]), JSON),
    "vllm_xargs": st.one_of(st.fixed_dictionaries({}, optional={"precision": PRECISIONS, "other": JSON}), JSON),
    "model": st.one_of(st.sampled_from(["tiny", "tiny@4", "tiny@auto", "tiny@5", "tiny@", "tiny@4@8", "TINY"]), JSON),
    "request_id": JSON,
    "max_tokens": JSON,
    "max_completion_tokens": JSON,
    "max_output_tokens": JSON,
    "n": JSON,
    "prompt": st.one_of(st.lists(st.sampled_from([SECRET, "a"]), max_size=4), JSON),
    "messages": JSON,
    "stream": JSON,
}


def escaped(name: str) -> st.SearchStrategy[str]:
    """The JSON text of a field name, some of its characters as escapes."""
    flags = st.lists(st.booleans(), min_size=len(name), max_size=len(name))
    text = flags.map(lambda on: "".join(f"\\u{ord(c):04x}" if flag else c for c, flag in zip(name, on, strict=True)))
    return st.one_of(st.just(name), text).map(lambda inner: f'"{inner}"')


MEMBERS = st.sampled_from(sorted(FIELDS)).flatmap(lambda name: st.tuples(escaped(name), FIELDS[name].map(json.dumps)))
OBJECTS = st.lists(MEMBERS, max_size=5).map(
    lambda members: "{" + ", ".join(f"{key}: {value}" for key, value in [('"user"', f'"{SECRET}"'), *members]) + "}"
)
DEEP = st.tuples(
    st.sampled_from(['{"%s":%s}', '{"vllm_xargs":{"%s":%s}}']),
    st.sampled_from(["precision", "prompt", "other"]),
    st.sampled_from([("[", "]"), ('{"a":', "}")]),
    st.integers(850, 1010),
).map(lambda d: d[0] % (d[1], d[2][0] * d[3] + "1" + d[2][1] * d[3]))
BODIES = st.one_of(
    OBJECTS.map(str.encode),
    OBJECTS.map(str.encode),
    DEEP.map(str.encode),
    JSON.map(json.dumps).map(str.encode),
    st.tuples(OBJECTS.map(str.encode), st.integers(0, 80), st.binary(max_size=3)).map(
        lambda t: t[0][: t[1]] + t[2] + t[0][t[1] :]
    ),
    st.binary(max_size=60),
    st.just(b"{" + b" " * 20_000 + b"}"),
)


def check_idle(harness) -> None:
    """Nothing is in flight: neither in the load, nor in a quota, nor among the requests that statistics are joined with."""
    assert harness.control.tracker.load().running == {}
    assert harness.control.tracker.load().waiting == 0
    assert not harness.joined.in_flight
    accounts = harness.control.admission._quotas._accounts.values()
    assert [account.in_flight for account in accounts] == [0] * len(accounts)


def check_refusal(answer) -> None:
    """An error in OpenAI's shape that gives nothing away."""
    assert 400 <= answer.status < 500
    text = b"".join(answer.chunks).decode("utf-8")
    error = json.loads(text)["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert error["code"] == answer.status
    assert isinstance(error["message"], str)
    assert 0 < len(error["message"]) <= 1000
    assert error["param"] is None or len(error["param"]) <= 64
    for secret in (SECRET, OPEN, NARROW, BOUNDED):
        assert secret not in text
    for name, value in answer.headers.items():
        assert "\r" not in name + value
        assert "\n" not in name + value


def check_served(answer, harness, key: str) -> str:
    """The profile, after checking that vLLM is asked for exactly one, which the tenant may use."""
    document = json.loads(harness.inner.bodies[-1].decode("utf-8"), object_pairs_hook=list)
    counts = Counter(name for name, _ in document)
    assert counts["vllm_xargs"] == 1
    assert counts["precision"] == 0
    assert counts["model"] <= 1
    [profile] = [value for name, value in dict(document)["vllm_xargs"] if name == "precision"]
    assert profile in ALLOWED[key]
    assert answer.headers["x-precision"] == profile
    assert answer.headers["x-precision-reason"] in REASONS
    return profile


@given(CREDENTIALS, st.one_of(LIKELY, HEADERS), BODIES, st.sampled_from(sorted(GENERATION_PATHS)))
@example(
    [(b"authorization", b"Bearer " + OPEN.encode())],
    [],
    b'{"vllm_xargs":{"a":' + b"[" * 980 + b"]" * 980 + b"}}",
    "/v1/messages",
)
@FUZZ
def test_any_request_is_answered_and_leaves_nothing_behind(guarded, credentials, headers, body, path):
    key = credentials[0][1].decode().removeprefix("Bearer ")
    sent = [*credentials, (b"x-secret", SECRET.encode()), *headers]
    calls = len(guarded.inner.bodies)
    answer = guarded.call(body, sent, path)
    check_idle(guarded)
    if answer.status != 200:
        check_refusal(answer)
        assert len(guarded.inner.bodies) == calls
        return
    profile = check_served(answer, guarded, key)
    named = [value for name, value in headers if name.lower() == b"x-precision"]
    if named and named[0].strip(b" \t") != b"auto":
        assert [value.strip(b" \t").decode() for value in named] == [profile]
        assert answer.headers["x-precision-reason"] == "header"


@given(
    st.sampled_from(PROFILES),
    st.sampled_from(["header", "body", "xargs", "model"]),
    LIKELY,
    st.sampled_from([OPEN, BOUNDED]),
    st.integers(0, 40),
)
@FUZZ
def test_a_precision_that_is_asked_for_is_never_changed(guarded, profile, way, headers, key, running):
    headers = [(name, value) for name, value in headers if name != b"x-precision"]
    fields = {"header": {}, "body": {"precision": profile}, "xargs": {"vllm_xargs": {"precision": profile}}}
    fields["model"] = {"model": f"tiny@{profile}"}
    if way == "header":
        headers.append((b"x-precision", profile.encode()))
    numbers = [guarded.control.tracker.begin("8", 500) for _ in range(running)]
    answer = guarded.call({"prompt": SECRET, **fields[way]}, [(b"authorization", b"Bearer " + key.encode()), *headers])
    for number in numbers:
        guarded.control.tracker.end(number)
    assert answer.status == 200
    assert check_served(answer, guarded, key) == profile
    check_idle(guarded)


@given(
    st.lists(
        st.tuples(
            st.sampled_from([b"authorization", b"Authorization", b"x-api-key"]),
            st.one_of(
                st.sampled_from([b"", b"Bearer", b"Bearer ", b"Basic " + OPEN.encode(), OPEN[:-1].encode()]),
                st.binary(max_size=9),
            ),
        ),
        max_size=3,
    ),
    BODIES,
)
@FUZZ
def test_no_request_without_a_key_is_read(guarded, credentials, body):
    answer = guarded.call(body, credentials)
    assert answer.status == 401
    check_refusal(answer)
    assert guarded.inner.bodies == []
    check_idle(guarded)


@given(
    st.sampled_from(["precision", "vllm_xargs", "model", "request_id", "vllm_xargs.precision"]).flatmap(
        lambda name: st.tuples(st.just(name), escaped(name.split(".")[-1]), escaped(name.split(".")[-1]))
    ),
    st.lists(st.sampled_from(['"4"', '"8"']), min_size=2, max_size=2),
    st.sampled_from(["", '"n": 1, ']),
)
@FUZZ
def test_a_field_that_decides_is_refused_when_it_is_there_twice(guarded, names, values, between):
    name, *spelled = names
    values = ["{}", "{}"] if name == "vllm_xargs" else values
    members = [f"{key}: {value}" for key, value in zip(spelled, values, strict=True)]
    text = "{" + f"{members[0]}, {between}{members[1]}" + "}"
    text = f'{{"vllm_xargs": {text}}}' if "." in name else text
    answer = guarded.call(text.encode(), [(b"authorization", b"Bearer " + OPEN.encode())])
    assert answer.status == 400
    check_refusal(answer)
    assert (answer.error["param"], guarded.inner.bodies) == (name, [])


@given(
    st.sampled_from(
        [("X-Precision", b"4"), ("X-Latency-Budget-Ms", b"30"), ("X-TTFT-Budget-Ms", b"30"), ("X-Precision-Policy", b"strict")]
    ),
    st.data(),
)
@FUZZ
def test_a_header_that_decides_is_refused_when_it_is_there_twice(guarded, header, data):
    name, value = header
    headers = [(data.draw(cased(name)), value) for _ in range(data.draw(st.integers(2, 4)))]
    answer = guarded.call(b"{}", [(b"authorization", b"Bearer " + OPEN.encode()), *headers])
    assert (answer.status, answer.error["param"]) == (400, name)
    check_idle(guarded)


@pytest.mark.parametrize(
    "shape", ['{"vllm_xargs":{"a":%s}}', '{"precision":%s}', '{"vllm_xargs":{"precision":%s}}', '{"prompt":%s}']
)
@pytest.mark.parametrize(("opening", "closing"), [("[", "]"), ('{"a":', "}")])
def test_nesting_at_the_edge_of_the_stack_is_answered(guarded, shape, opening, closing):
    """Reading a value, quoting it and writing it take different depths of the stack; each edge is somewhere in the range."""

    def status(depth: int) -> int:
        guarded.inner.bodies.clear()
        body = shape % (opening * depth + "1" + closing * depth)
        answer = guarded.call(body.encode(), [(b"authorization", b"Bearer " + OPEN.encode())])
        check_idle(guarded)
        return answer.status

    beyond = sys.getrecursionlimit() + 20
    assert status(beyond) == 400
    assert {status(depth) for depth in range(beyond - 250, beyond)} <= {200, 400}


@given(KEYS, KEYS, st.booleans())
@FUZZ
def test_two_keys_of_a_kind_are_none(guarded, first, second, plain):
    name, prefix = (b"x-api-key", b"") if plain else (b"authorization", b"Bearer ")
    assert guarded.call(b"{}", [(name, prefix + first.encode()), (name, prefix + second.encode())]).status == 401


@given(st.integers(0, 400), st.integers(0, 200))
@FUZZ
def test_many_headers_are_bounded_by_their_sum(guarded, number, size):
    headers = [(b"authorization", b"Bearer " + OPEN.encode()), *[(b"x-%d" % i, b"v" * size) for i in range(number)]]
    answer = guarded.call(b"{}", headers, content_length=False)
    total = sum(len(name) + len(value) for name, value in [(b"host", b"test"), *headers])
    assert answer.status == (431 if total > 4000 else 200)
    if answer.status == 431:
        check_refusal(answer)
    check_idle(guarded)


@given(KEYS, st.lists(st.binary(min_size=1, max_size=3), min_size=1, max_size=30), st.integers(0, 30))
@FUZZ
def test_a_client_that_goes_away_in_its_body_leaves_nothing(guarded, key, chunks, after):
    assume(after < len(chunks))
    answer = guarded.call(chunks, [(b"authorization", b"Bearer " + key.encode())], disconnect_after=after, content_length=False)
    assert answer.status == 0
    assert guarded.inner.bodies == []
    check_idle(guarded)


def test_a_long_error_is_quick(guarded):
    """Messages quote a few characters; making them may not cost what the request cost to send, many times over."""
    body = b'{"precision": [' + b"1," * 9000 + b"1]}"
    begun = time.monotonic()
    answer = guarded.call(body, [(b"authorization", b"Bearer " + OPEN.encode())])
    assert answer.status == 400
    check_refusal(answer)
    assert time.monotonic() - begun < 1
