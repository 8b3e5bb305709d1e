"""An ingress' `Tenants` from the cluster's configuration."""

from __future__ import annotations

import asyncio
import os
import time
from datetime import UTC, datetime
from pathlib import Path

from moeray.config import ClusterConfig
from moeray.controller.store import PASSWORD_VARIABLE
from moeray.ingress.tenants.tenants import Tenants
from moeray.tenancy import (
    GuardedQuotas,
    LocalQuotas,
    QuotaStore,
    RedisQuotas,
    Registry,
    TokenRules,
    TokenVerifier,
    UsageWriter,
    connect_async,
    load_secret,
    open_roster,
    open_usage,
    read_usage,
    secret_path,
    summarise,
)

READ_TIMEOUT_S = 5.0
"""Of Redis, for tenants and usage records: nobody's request waits for them."""


async def open_tenants(config: ClusterConfig, model: str, ingress: str) -> Tenants:
    """Read the tenants; the running loop is where they are asked.

    Args:
        model: the served model name.
        ingress: its name, different from any other's that writes usage records.
    Raises:
        ConfigError, RegistryUnavailable: nothing can be served by these tenants.
    """
    return await asyncio.to_thread(_read, config, model, ingress, asyncio.get_running_loop())


def _read(config: ClusterConfig, model: str, ingress: str, loop: asyncio.AbstractEventLoop) -> Tenants:
    password, rules = os.environ.get(PASSWORD_VARIABLE), config.tenants
    registry = Registry(open_roster(config, password, timeout_s=READ_TIMEOUT_S))
    secret = load_secret(secret_path(config))
    tokens = None
    if rules.jwks_file:
        accepted = TokenRules(rules.issuer, rules.audience, rules.tenant_claim, rules.leeway_s)
        tokens = TokenVerifier(Path(rules.jwks_file), accepted)
    usage = UsageWriter(open_usage(config, f"{ingress}-{os.getpid()}", password, timeout_s=READ_TIMEOUT_S))
    if config.redis.url:
        counts = RedisQuotas(connect_async(config.redis.url, password, timeout_s=rules.store_timeout_s))
        quotas: QuotaStore = GuardedQuotas(
            counts, on_failure=rules.on_store_failure, timeout_s=rules.store_timeout_s,
            num_ingresses=lambda: config.ingress.num_replicas,
        )  # fmt: skip
        return Tenants(model, registry, quotas, usage, secret, loop, tokens, watches=[counts.keep_alive])
    return Tenants(model, registry, LocalQuotas(month_tokens=_used_this_month(config)), usage, secret, loop, tokens)


def _used_this_month(config: ClusterConfig) -> dict[str, int]:
    """By tenant; counts in process begin with what the records tell."""
    now = datetime.fromtimestamp(time.time(), UTC)
    since = datetime(now.year, now.month, 1, tzinfo=UTC).timestamp()
    report = summarise(read_usage(Path(config.tenants.usage_dir), since=since), "tenant", since=since)
    return {tenant: row.prompt_tokens + row.completion_tokens for tenant, row in report.rows.items()}
