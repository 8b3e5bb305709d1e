"""Keys are kept as digests, a file's mistakes are named, what is written is read back."""

from __future__ import annotations

import hashlib
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moeray.tenancy import Forbidden, Identities, Limits, Roster, RosterError, Tenant
from moeray.tenancy.keys import matches, new_key, parse_key
from moeray.tenancy.roster import parse_roster, roster_to_data
from moeray.tenancy.roster_changes import add_key, create_tenant, delete_tenant, find, revoke, set_fields

NOW = datetime(2026, 11, 22, 12, tzinfo=UTC)
GRACE = timedelta(hours=1)
KEY = {"id": "0123456789ab", "sha256": "0" * 64, "created": "2026-11-22T12:00:00Z"}


def test_a_key_is_found_by_its_text_and_its_secret_is_nowhere_in_what_is_kept() -> None:
    roster, key = add_key(Roster([Tenant(name="search")]), "search", now=NOW)
    parts = parse_key(key.text)
    assert parts is not None
    id, secret = parts
    held = roster.key(id)
    assert held is not None
    assert len(secret) == 64
    assert held.sha256 == hashlib.sha256(secret.encode()).digest()
    assert matches(secret, held.sha256)
    assert not matches(secret[:-1] + ("0" if secret[-1] != "0" else "1"), held.sha256)
    assert secret not in str(roster_to_data(roster))
    assert secret not in repr(key)


def test_no_two_keys_are_alike() -> None:
    texts = {new_key(NOW).text for _ in range(100)}
    assert len({parse_key(text) for text in texts}) == 100


@pytest.mark.parametrize(
    "text",
    ["", "moeray-", "sk-123", "moeray-0123456789ab-", "moeray-0123456789AB-" + "0" * 64,
     "moeray-0123456789ab-" + "0" * 63, "moeray-0123456789ab-" + "0" * 64 + "\n", " moeray-0123456789ab-" + "0" * 64],
)  # fmt: skip
def test_what_is_no_key_is_none(text: str) -> None:
    assert parse_key(text) is None


def test_rotation_leaves_the_old_key_for_a_while_and_never_lengthens_its_life() -> None:
    roster, first = add_key(Roster([Tenant(name="search")]), "search", now=NOW)
    roster, short = add_key(roster, "search", now=NOW, expires=NOW + timedelta(minutes=1))
    roster, _ = add_key(roster, "search", now=NOW, grace=GRACE)
    states = {key.id: key for key in roster.tenants["search"].keys}
    assert states[first.record.id].expires == NOW + GRACE
    assert states[short.record.id].expires == NOW + timedelta(minutes=1)
    assert [key.state(NOW + GRACE) for key in roster.tenants["search"].keys] == ["expired", "expired", "active"]


def test_one_key_or_all_keys_are_revoked() -> None:
    roster, first = add_key(Roster([Tenant(name="search")]), "search", now=NOW)
    roster, second = add_key(roster, "search", now=NOW)
    roster = revoke(roster, "search", first.record.id, now=NOW)
    assert [key.state(NOW) for key in roster.tenants["search"].keys] == ["revoked", "active"]
    later = revoke(roster, "search", None, now=NOW + GRACE).tenants["search"].keys
    assert [key.revoked for key in later] == [NOW, NOW + GRACE]
    with pytest.raises(RosterError, match="has no key"):
        revoke(roster, "search", second.record.id[::-1] + "x", now=NOW)


def test_fields_are_set_alone_and_checked() -> None:
    roster = create_tenant(Roster(), "search", {"requests_per_minute": 5, "models": ["a"], "mtls": ["client"]})
    roster, _ = add_key(roster, "search", now=NOW)
    changed = find(set_fields(roster, "search", {"tokens_per_minute": 7, "priority": -3, "weight": 2.5}), "search")
    assert changed.limits == Limits(requests_per_minute=5, tokens_per_minute=7)
    assert (changed.models, changed.priority, changed.weight, len(changed.keys)) == (("a",), -3, 2.5, 1)
    with pytest.raises(RosterError, match=r"tenants\.search\.limits\.requests_per_minute: .*greater than"):
        set_fields(roster, "search", {"requests_per_minute": -1})
    with pytest.raises(RosterError, match="there already"):
        create_tenant(roster, "search", {})
    with pytest.raises(RosterError, match="no tenant chat"):
        delete_tenant(roster, "chat")
    assert not delete_tenant(roster, "search").tenants


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([], "must be a mapping"),
        ({"tenant": {}}, "tenant: unknown key"),
        ({"tenants": ["search"]}, "tenants: must be a mapping"),
        ({"tenants": {"search": 3}}, r"tenants\.search: must be a mapping"),
        ({"tenants": {"Search": {}}}, r"tenants\.Search\.name: .*match"),
        ({"tenants": {"a}b": {}}}, r"tenants\.a}b\.name: .*match"),
        ({"tenants": {"search": {"modles": []}}}, r"tenants\.search\.modles: unknown key; did you mean models\?"),
        ({"tenants": {"search": {"limits": {"request_per_minute": 1}}}},
         r"tenants\.search\.limits\.request_per_minute: unknown key; did you mean requests_per_minute\?"),
        ({"tenants": {"search": {"limits": {"requests_per_minute": 1.5}}}}, r"limits\.requests_per_minute: .*integer"),
        ({"tenants": {"search": {"limits": {"max_context": True}}}}, r"limits\.max_context: .*integer"),
        ({"tenants": {"search": {"weight": 0}}}, r"search\.weight: .*greater"),
        ({"tenants": {"search": {"keys": [{**KEY, "sha256": "x"}]}}},
         r"search\.keys\.0\.sha256: .*match"),
        ({"tenants": {"search": {"keys": [{**KEY, "created": "2026-11-22T12:00:00"}]}}},
         r"search\.keys\.0\.created: .*timezone"),
        ({"tenants": {"a": {"identities": {"mtls": ["x"]}}, "b": {"identities": {"mtls": ["x"]}}}},
         r"tenants\.b\.identities\.mtls: x is there twice"),
        ({"tenants": {"a": {"identities": {"jwt": ["x"]}}, "b": {"identities": {"jwt": ["x"]}}}},
         r"tenants\.b\.identities\.jwt"),
    ],
)  # fmt: skip
def test_a_wrong_field_is_named(data: object, message: str) -> None:
    with pytest.raises(RosterError, match=message) as caught:
        parse_roster(data, source="tenants.yaml")
    assert str(caught.value).startswith("tenants.yaml: ")


def test_every_wrong_tenant_is_reported_at_once() -> None:
    data = {"tenants": {"a": {"x": 1}, "b": {"y": 1}, "c": {}}}
    with pytest.raises(RosterError) as caught:
        parse_roster(data, source="f")
    assert len(str(caught.value).splitlines()) == 2


names = st.from_regex(r"[a-z0-9][a-z0-9._-]{0,10}", fullmatch=True)
counts = st.integers(0, 2**52)
limits = st.builds(Limits, *[counts] * 5)


@settings(max_examples=30)
@given(
    st.dictionaries(
        names,
        st.fixed_dictionaries({
            "limits": limits, "priority": st.integers(-1000, 1000), "weight": st.sampled_from([0.5, 1.0, 3.0]),
            "shares_cache": st.booleans(), "is_admin": st.booleans(),
            "models": st.lists(st.text(min_size=1, max_size=5), max_size=2).map(tuple),
            "num_keys": st.integers(0, 2),
        }),
        max_size=3,
    )
)  # fmt: skip
def test_what_is_written_is_read_back(entries: dict[str, dict[str, Any]]) -> None:
    roster = Roster()
    for name, entry in entries.items():
        num_keys = entry.pop("num_keys")
        identities = Identities(mtls=(f"CN {name}",), jwt=(name, f"{name} too"))
        roster = roster.with_tenant(Tenant(name=name, identities=identities, **entry))
        for _ in range(num_keys):
            roster, _key = add_key(roster, name, now=NOW, expires=NOW + GRACE)
    again = parse_roster(roster_to_data(roster), source="again")
    assert again.tenants == roster.tenants


def test_what_a_tenant_may_not_use_is_named_by_field() -> None:
    tenant = Tenant(name="search", models=("a", "b"), limits=Limits(max_context=100))
    tenant.check("a", 100)
    with pytest.raises(Forbidden) as caught:
        tenant.check("c", 1)
    assert caught.value.field == "model"
    with pytest.raises(Forbidden) as caught:
        tenant.check("a", 101)
    assert caught.value.field == "max_tokens"
    Tenant(name="any").check("c", 10**9)
