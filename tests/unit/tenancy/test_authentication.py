"""A request is one tenant's or nobody's: keys, certificates, headers. Tokens have a file of their own."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from moeray.config import ConfigError
from moeray.tenancy import (
    Authenticator,
    Identities,
    Registry,
    Roster,
    RosterFile,
    Tenant,
    Unauthenticated,
    cache_salt,
    credential_of,
    load_secret,
)
from moeray.tenancy.authentication import INVALID_KEY
from moeray.tenancy.roster_changes import add_key, revoke

NOW = datetime(2026, 11, 22, 12, tzinfo=UTC)


def authenticator(tmp_path: Path, roster: Roster, now: datetime = NOW) -> Authenticator:
    store = RosterFile(tmp_path / "tenants.json")
    store.edit(lambda _: roster)
    return Authenticator(Registry(store), clock=now.timestamp)


def reason(asked: Authenticator, credential: str | None, *names: str) -> str:
    with pytest.raises(Unauthenticated) as caught:
        asked.authenticate(credential, names)
    return caught.value.reason


def test_a_key_is_its_tenants(tmp_path: Path) -> None:
    roster, search = add_key(Roster([Tenant(name="search"), Tenant(name="chat")]), "search", now=NOW)
    roster, chat = add_key(roster, "chat", now=NOW)
    asked = authenticator(tmp_path, roster)
    for name, key in (("search", search), ("chat", chat)):
        principal = asked.authenticate(key.text)
        assert (principal.tenant.name, principal.key_id, principal.method) == (name, key.record.id, "key")


def test_a_wrong_secret_and_an_unknown_id_look_alike(tmp_path: Path) -> None:
    roster, key = add_key(Roster([Tenant(name="search")]), "search", now=NOW)
    roster, revoked = add_key(roster, "search", now=NOW)
    roster = revoke(roster, "search", revoked.record.id, now=NOW)
    asked = authenticator(tmp_path, roster)
    wrong = "0" * 64
    for text in (f"moeray-{key.record.id}-{wrong}", f"moeray-{'0' * 12}-{wrong}", f"moeray-{revoked.record.id}-{wrong}",
                 key.text[:-1], key.text + "0", "sk-1", "", "a.b.c"):  # fmt: skip
        assert reason(asked, text) == INVALID_KEY


def test_who_has_the_secret_learns_what_became_of_the_key(tmp_path: Path) -> None:
    roster, key = add_key(Roster([Tenant(name="search")]), "search", now=NOW, expires=NOW + timedelta(seconds=1))
    assert authenticator(tmp_path, roster, NOW + timedelta(seconds=0.9)).authenticate(key.text)
    assert reason(authenticator(tmp_path, roster, NOW + timedelta(seconds=1)), key.text) == "the API key has expired"
    roster = revoke(roster, "search", None, now=NOW)
    assert reason(authenticator(tmp_path, roster), key.text) == "the API key was revoked"


def test_a_certificate_is_one_tenants_and_a_key_goes_before_it(tmp_path: Path) -> None:
    roster = Roster([
        Tenant(name="search", identities=Identities(mtls=("spiffe://x/search", "search.x"))),
        Tenant(name="chat", identities=Identities(mtls=("chat.x",))),
    ])  # fmt: skip
    roster, key = add_key(roster, "chat", now=NOW)
    asked = authenticator(tmp_path, roster)
    assert asked.authenticate(None, ["other", "search.x", "spiffe://x/search"]).tenant.name == "search"
    assert asked.authenticate(None, ["search.x"]).method == "mtls"
    assert asked.authenticate(key.text, ["search.x"]).tenant.name == "chat"
    assert reason(asked, "sk-1", "search.x") == INVALID_KEY
    assert reason(asked, None, "search.x", "chat.x") == "the client certificate names several tenants"
    assert reason(asked, None, "SEARCH.X") == "the client certificate names no tenant"
    assert "an API key is needed" in reason(asked, None)


@pytest.mark.parametrize(
    ("headers", "found"),
    [
        ([], None),
        ([("Authorization", "Bearer abc")], "abc"),
        ([("authorization", "bearer  abc ")], "abc"),
        ([("X-API-Key", "abc")], "abc"),
        ([("x-api-key", "abc"), ("authorization", "Bearer abc")], "abc"),
        ([("content-type", "x")], None),
    ],
)
def test_a_credential_is_found_in_headers_and_metadata(headers: list[tuple[str, str]], found: str | None) -> None:
    assert credential_of(headers) == found


@pytest.mark.parametrize(
    "headers",
    [
        [("authorization", "Basic abc")],
        [("authorization", "abc")],
        [("authorization", "Bearer a"), ("authorization", "Bearer b")],
        [("authorization", "Bearer a"), ("x-api-key", "b")],
    ],
)
def test_another_scheme_or_two_credentials_are_refused(headers: list[tuple[str, str]]) -> None:
    with pytest.raises(Unauthenticated):
        credential_of(headers)


def test_salts_part_tenants_and_outlive_their_keys() -> None:
    secret, other = b"s" * 32, b"t" * 32
    search, chat = Tenant(name="search"), Tenant(name="chat")
    shared = [Tenant(name=name, shares_cache=True) for name in ("a", "b")]
    assert cache_salt(search, secret) == cache_salt(Tenant(name="search", priority=3), secret)
    salts = [
        cache_salt(search, secret), cache_salt(chat, secret), cache_salt(search, other),
        cache_salt(search, secret, "x"), cache_salt(chat, secret, "x"), cache_salt(search, secret, ""),
        cache_salt(shared[0], secret, "x"), None,
    ]  # fmt: skip
    assert len(set(salts)) == len(salts)
    assert cache_salt(shared[0], secret) is None
    assert cache_salt(shared[0], secret, "x") == cache_salt(shared[1], secret, "x")
    stolen = cache_salt(chat, secret)
    assert cache_salt(search, secret, stolen) != stolen
    assert cache_salt(shared[0], secret, stolen) != stolen


def test_the_clusters_secret_is_made_once_and_only_its_owners(tmp_path: Path) -> None:
    path = tmp_path / "state" / "secret"
    secret = load_secret(path)
    assert len(secret) >= 32
    assert load_secret(path) == secret
    assert path.stat().st_mode & 0o777 == 0o600
    assert load_secret(tmp_path / "other") != secret
    path.write_text("short")
    with pytest.raises(ConfigError, match=r"tenants\.secret_file: .* has 5 bytes"):
        load_secret(path)
    assert [each.name for each in path.parent.iterdir()] == ["secret"]
