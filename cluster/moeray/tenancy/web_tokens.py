"""JSON Web Tokens of an identity provider, checked with the public keys of a JWKS file.

What is accepted is decided by the file alone: a key has one algorithm, by its type, and the token's header must name
that one. So neither `none` nor a public key taken for an HMAC secret can pass.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jwt
from cryptography.hazmat.primitives.asymmetric.ec import SECP256R1, EllipticCurvePublicKey
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPublicKey

from moeray.config import ConfigError
from moeray.tenancy.errors import Unauthenticated
from moeray.tenancy.registry import POLL_S

MAX_TOKEN_CHARS = 8192
MIN_RSA_BITS = 2048
_logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class TokenRules:
    """What a token must say.

    Attributes:
        tenant_claim: the claim whose value (or one of whose values) is among a tenant's `identities.jwt`.
        leeway_s: how far clocks may differ.
    """

    issuer: str
    audience: str
    tenant_claim: str = "sub"
    leeway_s: float = 30.0


@dataclass(frozen=True, slots=True)
class _VerifyingKey:
    key: Any
    algorithm: str


class TokenVerifier:
    """See module docstring. `refresh` reads the file again if it changed; the last good keys stay."""

    def __init__(self, path: Path, rules: TokenRules) -> None:
        """Raises ConfigError if the file cannot be read or has no usable key."""
        self._path, self._rules = path, rules
        self._signature = self._stat()
        self._keys = _read_keys(path)

    def refresh(self) -> None:
        """Look once; blocks."""
        try:
            signature = self._stat()
            if signature == self._signature:
                return
            self._signature = signature
            self._keys = _read_keys(self._path)
        except ConfigError as error:
            _logger.error("THE NEW KEYS FOR TOKENS ARE IGNORED, those read before stay in force: %s", error)

    async def watch(self) -> None:
        """Run as a task until cancelled; reading is done in a thread."""
        while True:
            await asyncio.sleep(POLL_S)
            await asyncio.to_thread(self.refresh)

    def claim_values(self, token: str) -> tuple[str, ...]:
        """The values of the tenant claim of a valid token.

        Raises:
            Unauthenticated: it is not valid, and why.
        """
        if len(token) > MAX_TOKEN_CHARS:
            raise Unauthenticated(f"the token is longer than {MAX_TOKEN_CHARS} characters")
        rules = self._rules
        try:
            key = self._key_for(jwt.get_unverified_header(token))
            claims = jwt.decode(
                token, key.key, algorithms=[key.algorithm], issuer=rules.issuer, audience=rules.audience,
                leeway=rules.leeway_s, options={"require": ["exp", "iss", "aud"]},
            )  # fmt: skip
        except jwt.ExpiredSignatureError as error:
            raise Unauthenticated("the token has expired") from error
        except (jwt.PyJWTError, ValueError) as error:
            # One text for all of them: a forger learns nothing from it.
            raise Unauthenticated("the token is not valid here") from error
        value = claims.get(rules.tenant_claim)
        return tuple(each for each in (value if isinstance(value, list) else [value]) if isinstance(each, str))

    def _key_for(self, header: Mapping[str, Any]) -> _VerifyingKey:
        """By the header's key id; without one, the only key.

        Raises:
            ValueError: there is none.
        """
        id = header.get("kid")
        key = next(iter(self._keys.values())) if id is None and len(self._keys) == 1 else self._keys.get(str(id))
        if key is None:
            raise ValueError("no such key")
        return key

    def _stat(self) -> tuple[int, int, int]:
        try:
            stat = self._path.stat()
        except OSError as error:
            raise ConfigError(
                f"tenants.jwks_file: {self._path} cannot be read: {os.strerror(error.errno or 0)}"
            ) from error
        return stat.st_mtime_ns, stat.st_size, stat.st_ino


def _read_keys(path: Path) -> dict[str, _VerifyingKey]:
    """Key id (or position) -> key. Keys for encryption or other algorithms, as providers publish too, are left out."""
    try:
        entries = json.loads(path.read_bytes())["keys"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise ConfigError(f"tenants.jwks_file: {path} is no JSON Web Key Set: {type(error).__name__}") from error
    keys: dict[str, _VerifyingKey] = {}
    for position, entry in enumerate(entries if isinstance(entries, list) else []):
        key = _verifying_key(entry)
        if key is not None:
            keys[str(entry.get("kid", f"#{position}"))] = key
    if not keys:
        raise ConfigError(f"tenants.jwks_file: {path} has no key for RS256 (2048 bits), ES256 or EdDSA (Ed25519)")
    return keys


def _verifying_key(entry: Any) -> _VerifyingKey | None:
    if not isinstance(entry, dict) or entry.get("use", "sig") != "sig" or entry.get("kty") not in ("RSA", "EC", "OKP"):
        return None  # a symmetric key ("oct") would be a secret in a file of public keys
    algorithm = {"RSA": "RS256", "EC": "ES256", "OKP": "EdDSA"}[entry["kty"]]
    if entry.get("alg", algorithm) != algorithm:
        return None
    try:
        key = jwt.PyJWK(entry, algorithm=algorithm).key
    except (jwt.PyJWTError, ValueError, TypeError, KeyError):
        return None
    is_sound = (
        (isinstance(key, RSAPublicKey) and key.key_size >= MIN_RSA_BITS)
        or (isinstance(key, EllipticCurvePublicKey) and isinstance(key.curve, SECP256R1))
        or isinstance(key, Ed25519PublicKey)
    )
    return _VerifyingKey(key, algorithm) if is_sound else None
