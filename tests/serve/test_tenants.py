"""Tenants: what a key may do, and whose it is."""

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from matgptq_vllm.core.errors import InputError
from matgptq_vllm.core.precision import Catalogue
from serve.api_keys import digest_of
from serve.tenants import MAX_LIMIT, FieldError, NotAllowedError, Tenant, Tenants

CATALOGUE = Catalogue(("2", "3", "4", "6", "8", "mix-3.0"), "8")
KEY = "key-of-the-tenant-a"


def test_a_tenant_without_restrictions_may_have_everything():
    tenant = Tenant("free")
    for profile in (*CATALOGUE.profiles, "auto"):
        tenant.check_allowed(profile)
    tenant.check_held(CATALOGUE)


def test_what_is_not_allowed_is_refused_with_what_is():
    tenant = Tenant("narrow", default="3", allowed=("3", "mix-3.0"))
    for profile in ("3", "mix-3.0", "auto"):
        tenant.check_allowed(profile)
    with pytest.raises(
        NotAllowedError, match=r"precision '8' is not allowed for this API key; ask for one of 3, mix-3\.0, auto"
    ):
        tenant.check_allowed("8")


@pytest.mark.parametrize(
    ("field", "value", "index"),
    [
        ("name", "", None),
        ("name", "two words", None),
        ("name", "x" * 65, None),
        ("default", "no such name", None),
        ("default", "5", None),
        ("floor", "auto", None),
        ("floor", "8", None),
        ("floor", "", None),
        ("allowed", (), None),
        ("allowed", ("3", "auto"), 1),
        ("allowed", ("3", "4", "3"), 2),
        ("allowed", ("3", "4", "a b"), 2),
        *((limit, value, None) for limit in ("requests_per_minute", "tokens_per_minute") for value in (0, -1, True, 1.5)),
        ("max_concurrent", MAX_LIMIT + 1, None),
    ],
)
def test_a_field_that_cannot_have_its_value_is_named(field, value, index):
    right = Tenant("a", default="3", allowed=("3", "4"), floor="3")
    with pytest.raises(FieldError) as caught:
        dataclasses.replace(right, **{field: value})
    assert (caught.value.field, caught.value.index) == (field, index)
    assert str(caught.value) == f"{field} {caught.value.what}"


@pytest.mark.parametrize(
    ("tenant", "field", "index"),
    [
        (Tenant("a", default="5"), "default", None),
        (Tenant("a", floor="mix-9"), "floor", None),
        (Tenant("a", default="8", allowed=("8", "7")), "allowed", 1),
        (Tenant("a", allowed=("3", "4")), "allowed", None),
    ],
)
def test_what_the_replica_does_not_hold_is_found(tenant, field, index):
    with pytest.raises(FieldError, match="8") as caught:
        tenant.check_held(CATALOGUE)
    assert (caught.value.field, caught.value.index) == (field, index)


def test_auto_is_a_default_that_needs_no_profile():
    Tenant("a", default="auto", allowed=("3", "4")).check_held(CATALOGUE)


def test_a_key_finds_its_tenant_and_nothing_else_does():
    first, second = Tenant("first"), Tenant("second")
    tenants = Tenants([first, second], {digest_of(KEY): "second", digest_of("another"): "first"})
    assert tenants.find(KEY) is second
    assert tenants.find("another") is first
    for unknown in (None, "", KEY + " ", KEY[:-1], KEY.upper(), digest_of(KEY), "\udcff", "x" * 100_000):
        assert tenants.find(unknown) is None
    assert (len(tenants), tenants.names, tenants.num_keys) == (2, ("first", "second"), 2)
    assert (tenants.get("first"), tenants.get("third")) == (first, None)


def test_requests_without_a_known_key_are_the_anonymous_tenants():
    named, anonymous = Tenant("named"), Tenant("anonymous")
    tenants = Tenants([named, anonymous], {digest_of(KEY): "named"})
    assert tenants.find(None) is anonymous
    assert tenants.find("unknown") is anonymous
    assert tenants.find(KEY) is named


def test_neither_keys_nor_digests_can_be_read_off_the_object():
    tenants = Tenants([Tenant("a")], {digest_of(KEY): "a"})
    other = Tenants([Tenant("a")], {digest_of(KEY): "a"})
    held = [place for table in (tenants, other) for place in table._by_key]
    assert len(set(held)) == 2
    assert digest_of(KEY).encode() not in held
    assert bytes.fromhex(digest_of(KEY).removeprefix("sha256:")) not in held


@pytest.mark.parametrize(
    ("tenants", "keys", "message"),
    [
        (["a", "a"], {}, "two tenants are named 'a'"),
        (["a"], {digest_of(KEY): "b"}, "belongs to 'b', which is no tenant; there are a"),
        (["a"], {KEY: "a"}, "a key of tenant 'a' is no digest"),
    ],
)
def test_tenants_that_do_not_fit_together_are_refused(tenants, keys, message):
    with pytest.raises(InputError, match=message) as caught:
        Tenants([Tenant(name) for name in tenants], keys)
    assert KEY not in str(caught.value)


@given(st.binary().map(lambda raw: raw.decode("latin-1")))
def test_whatever_a_header_holds_can_be_looked_up(key):
    tenants = Tenants([Tenant("a")], {digest_of(KEY): "a"})
    assert (tenants.find(key) is not None) == (key == KEY)
