"""Cache isolation: what vLLM mixes into the hashes of a request's KV blocks, so that tenants find only their own."""

from __future__ import annotations

import contextlib
import hmac
import os
import secrets
from pathlib import Path

from moeray.config import ConfigError
from moeray.tenancy.tenant import Tenant

SECRET_BYTES = 32


def cache_salt(tenant: Tenant, cluster_secret: bytes, wanted: str | None = None) -> str | None:
    """For vLLM's `cache_salt`; None: none.

    From the tenant's name, never from a key: rotation keeps the cache. From the cluster's secret, so that nobody
    outside can compute another's salt and send it.

    Args:
        wanted: what the request itself asked for: it divides the tenant's part further, and opens no other's.
    """
    if tenant.shares_cache:
        # A text that no tenant's salt can be: those are digests of another input.
        return _derive(cluster_secret, "shared", wanted) if wanted else None
    return _derive(cluster_secret, f"tenant:{tenant.name}", wanted)


def _derive(cluster_secret: bytes, part: str, wanted: str | None) -> str:
    # A name has no zero byte, so no pair of (part, wanted) reads like another one.
    text = part if wanted is None else f"{part}\0{wanted}"
    return hmac.digest(cluster_secret, text.encode("utf-8", "surrogatepass"), "sha256").hex()


def load_secret(path: Path) -> bytes:
    """The cluster's secret; a new one is made where there is none. All ingresses must read the same.

    Raises:
        ConfigError: it cannot be read or made, or is shorter than 32 bytes.
    """
    try:
        with contextlib.suppress(FileExistsError):
            _make(path)
        secret = path.read_bytes().strip()
    except OSError as error:
        raise ConfigError(f"tenants.secret_file: {path}: {error.strerror}") from error
    if len(secret) < SECRET_BYTES:
        raise ConfigError(f"tenants.secret_file: {path} has {len(secret)} bytes, at least {SECRET_BYTES} are needed")
    return secret


def _make(path: Path) -> None:
    """Whole or not at all, and never over one that is there: several ingresses may start at once."""
    if path.exists():
        return
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}")
    try:
        with os.fdopen(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            file.write(secrets.token_hex(SECRET_BYTES))
        os.link(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
