"""The tenant file: right ones are read, wrong ones refused whole with the line."""

import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from matgptq_vllm.core.errors import FormatError
from matgptq_vllm.core.precision import Catalogue
from serve.api_keys import digest_of
from serve.tenant_file import FIELDS, MAX_FILE_BYTES, MAX_TENANTS, load_tenants, parse_tenants
from serve.tenants import Tenant

CATALOGUE = Catalogue(("2", "3", "4", "6", "8", "mix-3.0"), "8")
EXAMPLE = Path(__file__).parents[2] / "examples" / "tenants.yaml"
KEY, OTHER = "sk-0123456789abcdef-secret", "sk-fedcba9876543210-secret"
DIGEST, OTHER_DIGEST = digest_of(KEY), digest_of(OTHER)

FULL = f"""\
tenants:
  a:
    keys:
      - {DIGEST}
    default_precision: 4
    allowed_precisions: [3, "4", mix-3.0]
    auto_floor: 3
    requests_per_minute: 60
    tokens_per_minute: 20000
    max_concurrent_requests: 8
  anonymous:
    default_precision: auto
"""


def parse(text: str, catalogue: Catalogue | None = None):
    return parse_tenants(text.encode(), "t.yaml", catalogue)


def refused(text: str, catalogue: Catalogue | None = None) -> str:
    with pytest.raises(FormatError) as caught:
        parse(text, catalogue)
    return str(caught.value)


def with_field(line: str) -> str:
    """A right file but for its last line, the fourth."""
    return f"tenants:\n  a:\n    keys: [{DIGEST}]\n    {line}\n"


def test_every_field_arrives():
    tenants = parse(FULL, CATALOGUE)
    assert tenants.find(KEY) == Tenant("a", "4", ("3", "4", "mix-3.0"), "3", 60, 20000, 8)
    assert tenants.find(None) == Tenant("anonymous", "auto")
    assert (tenants.names, tenants.num_keys) == (("a", "anonymous"), 1)


def test_only_keys_are_needed():
    assert parse(f"tenants: {{a: {{keys: [{DIGEST}, '{OTHER_DIGEST}']}}}}", CATALOGUE).find(OTHER) == Tenant("a")


def test_the_example_is_right():
    tenants = load_tenants(EXAMPLE, CATALOGUE)
    assert tenants.names == ("chat", "batch", "evaluation", "anonymous")
    assert (tenants.get("chat").default, tenants.get("chat").floor) == ("auto", "3")
    assert tenants.get("batch").allowed == ("2", "3", "4")
    assert tenants.find("unknown").requests_per_minute == 6
    text = EXAMPLE.read_text(encoding="utf-8")
    assert all(f" {field}: " in text for field in FIELDS)


@pytest.mark.parametrize(
    ("line", "place", "message"),
    [
        ("auto_flor: 3", "4:5", "tenant 'a': unknown field 'auto_flor'; it may have keys, default_precision,"),
        ("<<: {}", "4:5", "tenant 'a': unknown field '<<'"),
        ("keys: []", "4:5", "'keys' is in tenant 'a' twice, first on line 3"),
        ("default_precision: 'no such'", "4:24", "tenant 'a': default_precision has 'no such'; use letters"),
        ("default_precision:", "4:23", "tenant 'a': default_precision has empty, which is no precision"),
        ("default_precision: yes", "4:24", "tenant 'a': default_precision has 'yes', which is no precision"),
        ("default_precision: [4]", "4:24", "tenant 'a': default_precision has a list, which is no precision"),
        ("default_precision: -4", "4:24", "tenant 'a': default_precision has '-4'; use letters"),
        ("auto_floor: auto", "4:17", "tenant 'a': auto_floor is 'auto'; it must be a profile"),
        ("allowed_precisions: 4", "4:25", "tenant 'a': allowed_precisions is '4'; it must be a list of precisions"),
        ("allowed_precisions: []", "4:25", "tenant 'a': allowed_precisions is empty"),
        ("allowed_precisions: [4, auto]", "4:29", "tenant 'a': allowed_precisions has 'auto', which every tenant may ask for"),
        ("allowed_precisions: [4, 3, 4]", "4:32", "tenant 'a': allowed_precisions has '4' twice"),
        ("requests_per_minute: 0", "4:26", "tenant 'a': requests_per_minute is 0; it must be a whole number from 1"),
        ("requests_per_minute: -1", "4:26", "tenant 'a': requests_per_minute is '-1'; it must be a whole number"),
        ("requests_per_minute: 1.5", "4:26", "tenant 'a': requests_per_minute is '1.5'; it must be a whole number"),
        ("requests_per_minute: '60'", "4:26", "tenant 'a': requests_per_minute is '60'; it must be a whole number"),
        ("tokens_per_minute: 1_000", "4:24", "tenant 'a': tokens_per_minute is '1_000'; it must be a whole number"),
        ("tokens_per_minute: 0x10", "4:24", "tenant 'a': tokens_per_minute is '0x10'; it must be a whole number"),
        ("tokens_per_minute: " + "9" * 400, "4:24", "tenant 'a': tokens_per_minute is '9"),
        ("max_concurrent_requests: true", "4:30", "tenant 'a': max_concurrent_requests is 'true'; it must be"),
        ("max_concurrent_requests:", "4:29", "tenant 'a': max_concurrent_requests is empty; it must be"),
        ("b: {", "5:1", "not YAML: "),
    ],
)
def test_a_wrong_field_is_named_with_place_value_and_what_is_allowed(line, place, message):
    assert refused(with_field(line)).startswith(f"t.yaml:{place}: {message}")


def test_a_default_or_floor_outside_of_what_is_allowed_is_refused_at_its_own_line():
    assert refused(with_field("allowed_precisions: [3, 4]\n    default_precision: 8")).startswith(
        "t.yaml:5:24: tenant 'a': default_precision is '8', which this tenant is not allowed; it may be 3, 4"
    )
    assert refused(with_field("auto_floor: 6\n    allowed_precisions: [3, 4]")).startswith(
        "t.yaml:4:17: tenant 'a': auto_floor"
    )


@pytest.mark.parametrize(
    ("line", "place", "message"),
    [
        (
            "default_precision: 5",
            "4:24",
            "default_precision is '5', which this replica does not hold; it holds 2, 3, 4, 6, 8, mix",
        ),
        ("auto_floor: mix-9", "4:17", "auto_floor is 'mix-9', which this replica does not hold"),
        ("allowed_precisions: [8, 03]", "4:29", "allowed_precisions has '03', which this replica does not hold"),
        (
            "allowed_precisions: [3, 4]",
            "4:25",
            "allowed_precisions is 3, 4, without the replica's default 8; allow it, or give",
        ),
    ],
)
def test_profiles_are_checked_once_the_replica_is_known(line, place, message):
    parse(with_field(line))
    assert refused(with_field(line), CATALOGUE).startswith(f"t.yaml:{place}: tenant 'a': {message}")


@pytest.mark.parametrize(
    "entry",
    [
        f"[{KEY}]",
        f"[{DIGEST}, '{KEY}']",
        f"[sha256:{KEY}]",
        KEY,
        f"{{{KEY}: {KEY}}}",
        f"[[{KEY}]]",
        f"[{DIGEST.upper()}]",
        f"[{DIGEST}0]",
        f"[{DIGEST[:-1]}]",
        f"[{DIGEST.removeprefix('sha256:')}]",
        "[]",
        "",
        "['']",
    ],
)
def test_what_is_no_digest_is_refused_with_the_command_and_never_quoted(entry):
    message = refused(f"tenants:\n  a:\n    keys: {entry}\n")
    assert message.startswith("t.yaml:3:")
    assert "`matgptq hash-key`" in message
    assert KEY not in message
    assert DIGEST[20:] not in message


@pytest.mark.parametrize(
    "text", [KEY, f"tenants: {KEY}", f"tenants: {{a: {KEY}}}", f"tenants: {{a: {{key: {KEY}}}}}", f"tenants:\n  a:\n  {KEY}"]
)
def test_a_key_in_the_wrong_place_is_not_quoted_either(text):
    assert KEY not in refused(text)


def test_one_key_belongs_to_one_tenant_once():
    twice = f"tenants:\n  a:\n    keys:\n      - {DIGEST}\n      - {DIGEST}\n"
    assert refused(twice).startswith(f"t.yaml:5:9: tenant 'a': keys has {DIGEST[:15]}..., which tenant 'a' has on line 4")
    shared = f"tenants:\n  a:\n    keys: [{DIGEST}]\n  b:\n    keys: [{OTHER_DIGEST}, {DIGEST}]\n"
    assert "t.yaml:5:" in refused(shared)
    assert "which tenant 'a' has on line 3" in refused(shared)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "t.yaml:1:1: the file is empty; it needs the field tenants"),
        ("---\n", "t.yaml:2:1: the file is empty; it must be a mapping"),
        ("{}", "t.yaml:1:1: the file has no field; it needs tenants"),
        ("[]", "t.yaml:1:1: the file is a list; it must be a mapping"),
        (FULL + "tenant: {}\n", "t.yaml:13:1: unknown field 'tenant'; the file has one field, tenants"),
        (FULL + "tenants: {}\n", "t.yaml:13:1: 'tenants' is in the file twice, first on line 1"),
        (FULL + "  a: {}\n", "t.yaml:13:3: 'a' is in tenants twice, first on line 2"),
        ("tenants: {}", "t.yaml:1:1: tenants has 0 entries; 1 to"),
        ("tenants:\n", "t.yaml:1:9: tenants is empty; it must be a mapping"),
        ("tenants:\n  a:\n", "t.yaml:2:5: tenant 'a' is empty; it must be a mapping"),
        ("tenants:\n  a: {auto_floor: 3}\n", "t.yaml:2:3: tenant 'a': it has no keys, so nobody could use it"),
        (f"tenants:\n  a b: {{keys: [{DIGEST}]}}\n", "t.yaml:2:3: the name of a tenant has 'a b'; use letters"),
        (f"tenants:\n  anonymous:\n    keys: [{DIGEST}]\n", "t.yaml:3:5: tenant 'anonymous': it has keys, but is for requests"),
        ("tenants:\n  a: &x {}\n  b: *x\n", "t.yaml:2:6: anchors (&name) and aliases (*name) are not allowed"),
    ],
)
def test_a_file_of_another_shape_is_refused(text, message):
    assert refused(text).startswith(message)


def test_size_and_number_of_tenants_are_bounded():
    assert f"larger than {MAX_FILE_BYTES} bytes" in refused("#" * (MAX_FILE_BYTES + 1))
    names = [f"  t{index}: {{keys: ['sha256:{index:064x}']}}\n" for index in range(MAX_TENANTS + 1)]
    assert len(parse("tenants:\n" + "".join(names[1:]))) == MAX_TENANTS
    assert refused("tenants:\n" + "".join(names)).startswith(f"t.yaml:1:1: tenants has {MAX_TENANTS + 1} entries; 1 to 500")


def test_a_file_is_read_by_its_path_and_named_by_it(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(FULL)
    assert load_tenants(path).find(KEY) == load_tenants(str(path)).find(KEY)
    path.write_text("a: 1")
    with pytest.raises(FormatError, match=rf"^{path}:1:1: unknown field 'a'"):
        load_tenants(path)


def test_what_is_no_file_is_an_error_and_not_a_wait(tmp_path):
    with pytest.raises(FileNotFoundError):
        load_tenants(tmp_path / "none.yaml")
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path, tmp_path / "pipe"):
        with pytest.raises(FormatError, match="is no regular file"):
            load_tenants(path)


@given(st.integers(0, len(FULL)), st.text(st.sampled_from("ab3:-[]{},'\"# \n&*!"), max_size=4), st.integers(0, 12))
def test_a_damaged_file_is_right_or_refused_with_a_place(at, inserted, removed):
    text = FULL[:at] + inserted + FULL[at + removed :]
    try:
        tenants = parse(text, CATALOGUE)
    except FormatError as error:
        line, column = str(error).split(":")[1:3]
        assert 1 <= int(line) <= text.count("\n") + 2
        assert int(column) >= 1
    else:
        assert 1 <= len(tenants) <= 2
