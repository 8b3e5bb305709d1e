"""API keys: `moeray-<id>-<secret>`, made once, kept as a digest.

The secret has 256 random bits, so one SHA-256 is as good as any slow hash: those make guessing a person's password
dear, and there is nothing to guess here (docs/adr/0010).
"""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
from dataclasses import dataclass
from datetime import datetime

from moeray.tenancy.tenant import KeyRecord

PREFIX = "moeray-"
_FORM = re.compile(r"moeray-([0-9a-f]{12})-([0-9a-f]{64})")


@dataclass(frozen=True, slots=True)
class NewKey:
    """Attributes: text: what the client sends, shown once. record: what is kept."""

    text: str
    record: KeyRecord

    def __repr__(self) -> str:
        return f"NewKey(id={self.record.id})"  # the secret must not get into a log


def new_key(created: datetime, expires: datetime | None = None) -> NewKey:
    """A key from the system's source of randomness."""
    id, secret = secrets.token_hex(6), secrets.token_hex(32)
    record = KeyRecord(id=id, sha256=digest(secret).hex(), created=created, expires=expires)
    return NewKey(f"{PREFIX}{id}-{secret}", record)


def parse_key(text: str) -> tuple[str, str] | None:
    """(id, secret), or None if the text is no key of ours."""
    found = _FORM.fullmatch(text)
    return (found[1], found[2]) if found else None


def digest(secret: str) -> bytes:
    return hashlib.sha256(secret.encode()).digest()


def matches(secret: str, sha256: bytes) -> bool:
    """In a time that does not depend on where they differ."""
    return hmac.compare_digest(digest(secret), sha256)
