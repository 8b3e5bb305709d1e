"""Only a token that the provider's own key signed, for us, and that has not expired, names a tenant."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import hmac
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jwt
import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa

from moeray.config import ConfigError
from moeray.tenancy import (
    Authenticator,
    Identities,
    Registry,
    Roster,
    RosterFile,
    Tenant,
    TokenRules,
    TokenVerifier,
    Unauthenticated,
)

RULES = TokenRules(issuer="https://id.example.org", audience="moeray", tenant_claim="team", leeway_s=5)
KEYS: dict[str, Any] = {
    "RS256": rsa.generate_private_key(public_exponent=65537, key_size=2048),
    "ES256": ec.generate_private_key(ec.SECP256R1()),
    "EdDSA": ed25519.Ed25519PrivateKey.generate(),
}
ALGORITHMS = {
    "RS256": jwt.algorithms.RSAAlgorithm,
    "ES256": jwt.algorithms.ECAlgorithm,
    "EdDSA": jwt.algorithms.OKPAlgorithm,
}


def public(algorithm: str, **more: str) -> dict[str, Any]:
    entry: dict[str, Any] = ALGORITHMS[algorithm].to_jwk(KEYS[algorithm].public_key(), as_dict=True)
    return {**entry, "kid": algorithm, **more}


def claims(**changes: Any) -> dict[str, Any]:
    given = {"iss": RULES.issuer, "aud": "moeray", "exp": time.time() + 3600, "team": "search", **changes}
    return {name: value for name, value in given.items() if value is not None}


def token(algorithm: str = "ES256", kid: str | None = "", **changes: Any) -> str:
    headers = {} if kid is None else {"kid": kid or algorithm}
    return jwt.encode(claims(**changes), KEYS[algorithm], algorithm=algorithm, headers=headers)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "jwks.json"
    path.write_text(json.dumps({"keys": [public(algorithm) for algorithm in KEYS]}))
    return path


@pytest.fixture
def verifier(path: Path) -> TokenVerifier:
    return TokenVerifier(path, RULES)


@pytest.mark.parametrize("algorithm", list(KEYS))
def test_a_good_token_gives_its_claim(verifier: TokenVerifier, algorithm: str) -> None:
    assert verifier.claim_values(token(algorithm)) == ("search",)
    assert verifier.claim_values(token(algorithm, team=["a", 3, "b"])) == ("a", "b")
    assert verifier.claim_values(token(algorithm, team=None)) == ()
    assert verifier.claim_values(token(algorithm, exp=time.time() - 1)) == ("search",), "within the leeway"


def unsigned(header: dict[str, Any], payload: dict[str, Any], sign: Callable[[bytes], bytes] = lambda _: b"") -> str:
    def part(data: bytes) -> bytes:
        return base64.urlsafe_b64encode(data).rstrip(b"=")

    body = b".".join(part(json.dumps(each).encode()) for each in (header, payload))
    return (body + b"." + part(sign(body))).decode()


def pem(algorithm: str) -> bytes:
    form = serialization.PublicFormat.SubjectPublicKeyInfo
    encoded: bytes = KEYS[algorithm].public_key().public_bytes(serialization.Encoding.PEM, form)
    return encoded


def confused(algorithm: str) -> str:
    """The public key, taken for the secret of an HMAC."""
    sign = hmac.new(pem(algorithm), digestmod=hashlib.sha256)

    def signed(body: bytes) -> bytes:
        sign.update(body)
        return sign.digest()

    return unsigned({"alg": "HS256", "kid": algorithm}, claims(), signed)


STRANGER = ec.generate_private_key(ec.SECP256R1())


@pytest.mark.parametrize(
    "make",
    [
        lambda: unsigned({"alg": "none"}, claims()),
        lambda: unsigned({"alg": "none", "kid": "RS256"}, claims()),
        lambda: unsigned({"alg": "None", "kid": "ES256"}, claims()),
        lambda: unsigned({"alg": "RS256", "kid": "RS256"}, claims()),
        lambda: confused("RS256"),
        lambda: confused("ES256"),
        lambda: token("ES256", kid="RS256"),
        lambda: token("RS256", kid="ES256"),
        lambda: token("ES256", kid="unknown"),
        lambda: token("ES256", kid=None),
        lambda: jwt.encode(claims(), KEYS["RS256"], algorithm="RS512", headers={"kid": "RS256"}),
        lambda: jwt.encode(claims(), KEYS["RS256"], algorithm="PS256", headers={"kid": "RS256"}),
        lambda: jwt.encode(claims(), STRANGER, algorithm="ES256", headers={"kid": "ES256"}),
        lambda: token(iss="https://evil.example.org"),
        lambda: token(iss=None),
        lambda: token(aud="other"),
        lambda: token(aud=None),
        lambda: token(exp=None),
        lambda: token(exp=time.time() - 60),
        lambda: token(nbf=time.time() + 600),
        lambda: token(exp="tomorrow"),
        lambda: token(exp=float("inf")),
        lambda: token(exp=float("nan")),
        lambda: token(exp=[]),
        lambda: token(nbf={}),
        lambda: token(aud=3),
        lambda: token()[:-4] + "AAAA",
        lambda: token().replace(".", "", 1),
        lambda: "..",
        lambda: "a.b.c",
        lambda: "é.ü.ö",
        lambda: "\x00" * 50 + "..",
        lambda: base64.urlsafe_b64encode(b"[" * 6000).decode() + ".e30.AAAA",
        lambda: base64.urlsafe_b64encode(b'{"a":' * 1000 + b"1" + b"}" * 1000).decode() + ".e30.AAAA",
    ],
)  # fmt: skip
def test_any_other_token_is_nobodys(verifier: TokenVerifier, make: Callable[[], str]) -> None:
    with pytest.raises(Unauthenticated):
        verifier.claim_values(make())


def test_no_time_is_spent_on_a_token_that_is_too_long(verifier: TokenVerifier) -> None:
    with pytest.raises(Unauthenticated, match="longer than 8192 characters"):
        verifier.claim_values(token(more="x" * 9000))


def test_keys_that_could_be_misused_are_not_taken_from_the_file(path: Path) -> None:
    weak = rsa.generate_private_key(public_exponent=65537, key_size=1024)
    other_curve = ec.generate_private_key(ec.SECP384R1())
    entries = [
        {"kty": "oct", "kid": "a", "k": "c2VjcmV0", "alg": "HS256"},
        public("RS256", use="enc"),
        public("RS256", alg="RS512"),
        jwt.algorithms.RSAAlgorithm.to_jwk(weak.public_key(), as_dict=True),
        jwt.algorithms.ECAlgorithm.to_jwk(other_curve.public_key(), as_dict=True),
        jwt.algorithms.OKPAlgorithm.to_jwk(KEYS["EdDSA"], as_dict=True),
        {"kty": "RSA"}, "text", 7,
    ]  # fmt: skip
    path.write_text(json.dumps({"keys": entries}))
    with pytest.raises(ConfigError, match=r"tenants\.jwks_file: .* has no key"):
        TokenVerifier(path, RULES)
    path.write_text(json.dumps({"keys": [*entries, public("ES256")]}))
    assert TokenVerifier(path, RULES).claim_values(token("ES256")) == ("search",)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"keys": 3}', '{"keys": []}', "\xff"])
def test_a_file_without_keys_is_refused_at_the_start(path: Path, text: str) -> None:
    path.write_text(text)
    with pytest.raises(ConfigError, match=r"tenants\.jwks_file"):
        TokenVerifier(path, RULES)


def test_keys_change_with_the_file_and_a_wrong_file_changes_nothing(path: Path, verifier: TokenVerifier) -> None:
    old, new = token("ES256"), token("EdDSA")
    path.write_text(json.dumps({"keys": [public("EdDSA")]}))
    verifier.refresh()
    assert verifier.claim_values(new) == ("search",)
    with pytest.raises(Unauthenticated):
        verifier.claim_values(old)
    path.write_text("{")
    verifier.refresh()
    assert verifier.claim_values(new) == ("search",)
    path.unlink()
    verifier.refresh()
    assert verifier.claim_values(new) == ("search",)
    path.write_text(json.dumps({"keys": [public("ES256")]}))
    verifier.refresh()
    assert verifier.claim_values(token("ES256", kid=None)) == ("search",), "one key needs no id"


async def test_keys_are_looked_for_again_by_themselves(path: Path, verifier: TokenVerifier) -> None:
    watch = asyncio.create_task(verifier.watch())
    path.write_text(json.dumps({"keys": [public("EdDSA")]}))  # noqa: ASYNC240 a small file
    deadline = time.monotonic() + 60
    while len(verifier._keys) > 1:
        assert time.monotonic() < deadline
        await asyncio.sleep(0.02)
    watch.cancel()


def test_a_token_is_the_tenant_that_lists_its_claim(tmp_path: Path, verifier: TokenVerifier) -> None:
    store = RosterFile(tmp_path / "tenants.yaml")
    tenants = [Tenant(name=name, identities=Identities(jwt=(f"team-{name}",))) for name in ("search", "chat")]
    store.edit(lambda _: Roster(tenants))
    asked = Authenticator(Registry(store), verifier)
    principal = asked.authenticate(token(team="team-chat"))
    assert (principal.tenant.name, principal.key_id, principal.method) == ("chat", "", "jwt")
    assert asked.authenticate(token(team=["x", "team-chat"])).tenant.name == "chat"
    for team in ("chat", ["team-chat", "team-search"], None, 3):
        with pytest.raises(Unauthenticated, match="the token names"):
            asked.authenticate(token(team=team))
    with pytest.raises(Unauthenticated, match="API key is not valid"):
        Authenticator(Registry(store)).authenticate(token(team="team-chat"))
