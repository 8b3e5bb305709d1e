"""Where a cluster's tenants, usage records and secret are, by its configuration. Reaches nothing yet."""

from __future__ import annotations

from pathlib import Path

from moeray.config import ClusterConfig, ConfigError
from moeray.tenancy.redis_connection import connect
from moeray.tenancy.registry import RosterStore
from moeray.tenancy.roster_file import RosterFile
from moeray.tenancy.roster_redis import RosterRedis
from moeray.tenancy.usage_files import UsageFiles
from moeray.tenancy.usage_stream import UsageStream
from moeray.tenancy.usage_writer import UsageSink


def open_roster(config: ClusterConfig, password: str | None, *, timeout_s: float) -> RosterStore:
    """`tenants.file`, else Redis.

    Raises:
        ConfigError: neither is set.
    """
    if config.tenants.file:
        return RosterFile(Path(config.tenants.file))
    if not config.redis.url:
        raise ConfigError("tenants.file: set it, or redis.url: the tenants are in one of them")
    return RosterRedis(connect(config.redis.url, password, timeout_s=timeout_s))


def open_usage(config: ClusterConfig, name: str, password: str | None, *, timeout_s: float) -> UsageSink:
    """Where `name` writes its usage records.

    Raises:
        ConfigError: tenants.usage_dir is not set.
    """
    tenants = config.tenants
    if tenants.usage == "redis":
        return UsageStream(connect(config.redis.url, password, timeout_s=timeout_s))
    return UsageFiles(_set("usage_dir", tenants.usage_dir), name, keep_days=tenants.usage_days)


def secret_path(config: ClusterConfig) -> Path:
    """Of the cluster's secret. Raises ConfigError if it is not set."""
    return _set("secret_file", config.tenants.secret_file)


def _set(key: str, path: str) -> Path:
    if not path:
        raise ConfigError(f"tenants.{key}: set it to an absolute path (`moeray up` has a default)")
    return Path(path)
