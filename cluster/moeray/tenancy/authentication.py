"""Whose request it is: API key, token of an identity provider, or client certificate."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal

from moeray.tenancy.errors import Unauthenticated
from moeray.tenancy.keys import PREFIX, matches, parse_key
from moeray.tenancy.registry import Registry
from moeray.tenancy.tenant import Tenant
from moeray.tenancy.web_tokens import TokenVerifier

Method = Literal["key", "jwt", "mtls"]
NOBODY = bytes(32)
"""No secret's digest: a key id that does not exist is compared with it, so that it takes as long as one that does."""
INVALID_KEY = "the API key is not valid"
NO_CREDENTIAL = "an API key is needed: `Authorization: Bearer moeray-...`"


@dataclass(frozen=True, slots=True)
class Principal:
    """Who asks.

    Attributes:
        key_id: of the API key; empty for other methods.
        method: how it was shown.
    """

    tenant: Tenant
    key_id: str
    method: Method


def credential_of(headers: Iterable[tuple[str, str]]) -> str | None:
    """What HTTP headers or gRPC metadata (names in any case) carry as a key or token.

    Raises:
        Unauthenticated: another scheme than Bearer, or two that differ.
    """
    found: set[str] = set()
    for name, value in headers:
        name = name.lower()
        if name == "x-api-key":
            found.add(value.strip())
        elif name == "authorization":
            scheme, _, rest = value.strip().partition(" ")
            if scheme.lower() != "bearer":
                raise Unauthenticated("Authorization must be `Bearer` and a key")
            found.add(rest.strip())
    if len(found) > 1:
        raise Unauthenticated("Authorization and x-api-key differ")
    return found.pop() if found else None


class Authenticator:
    """See module docstring. Never blocks: it looks into memory only."""

    def __init__(
        self, registry: Registry, tokens: TokenVerifier | None = None, clock: Callable[[], float] = time.time
    ) -> None:
        """`clock` gives seconds since 1970."""
        self._registry, self._tokens, self._clock = registry, tokens, clock

    def authenticate(self, credential: str | None, peer_names: Iterable[str] = ()) -> Principal:
        """The tenant that a request is for.

        Args:
            credential: from `credential_of`. If there is one it decides, whatever the certificate says.
            peer_names: common name and alternative names of a client certificate that TLS has verified.
        Raises:
            Unauthenticated: nobody's.
        """
        if credential is None:
            return self._by_certificate(peer_names)
        if credential.startswith(PREFIX) or self._tokens is None:
            return self._by_key(credential)
        return self._by_token(credential, self._tokens)

    def _by_key(self, credential: str) -> Principal:
        parts = parse_key(credential)
        if parts is None:
            raise Unauthenticated(INVALID_KEY)
        id, secret = parts
        held = self._registry.roster.key(id)
        if not matches(secret, held.sha256 if held else NOBODY) or held is None:
            raise Unauthenticated(INVALID_KEY)
        # From here on the client has shown the secret: it may know what became of the key.
        if held.is_revoked:
            raise Unauthenticated("the API key was revoked")
        if held.ends is not None and held.ends <= self._clock():
            raise Unauthenticated("the API key has expired")
        return Principal(held.tenant, id, "key")

    def _by_token(self, token: str, tokens: TokenVerifier) -> Principal:
        roster = self._registry.roster
        found = {tenant.name: tenant for each in tokens.claim_values(token) if (tenant := roster.by_claim(each))}
        return Principal(_only(found.values(), "token"), "", "jwt")

    def _by_certificate(self, names: Iterable[str]) -> Principal:
        names = list(names)
        if not names:
            raise Unauthenticated(NO_CREDENTIAL)
        roster = self._registry.roster
        found = {tenant.name: tenant for each in names if (tenant := roster.by_certificate(each))}
        return Principal(_only(found.values(), "client certificate"), "", "mtls")


def _only(tenants: Iterable[Tenant], what: str) -> Tenant:
    found = list(tenants)
    if len(found) != 1:
        raise Unauthenticated(f"the {what} names {'no tenant' if not found else 'several tenants'}")
    return found[0]
