"""Where a cluster's tenants and usage records are, for the commands and for the ingress."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from redis import Redis

from moeray.cli import state_file
from moeray.config import ClusterConfig
from moeray.controller.store import PASSWORD_VARIABLE
from moeray.tenancy import RosterFile, RosterRedis, RosterStore, connect, read_stream, read_usage

TIMEOUT_S = 10.0
"""A person waits: longer than an ingress does."""


def open_roster(config: ClusterConfig) -> RosterStore:
    """`tenants.file`; else Redis if there is one; else the state directory's file. Reaches nothing yet."""
    if config.tenants.file:
        return RosterFile(Path(config.tenants.file).expanduser())
    if config.redis.url:
        return RosterRedis(redis_client(config))
    return RosterFile(state_file.state_dir() / "tenants.yaml")


def usage_folder(config: ClusterConfig) -> Path:
    return Path(config.tenants.usage_dir).expanduser() if config.tenants.usage_dir else state_file.state_dir() / "usage"


def usage_lines(config: ClusterConfig, since: float) -> Iterator[bytes | str]:
    """Records from `since` (seconds since 1970) on, and some before it.

    Raises:
        OSError: they cannot be read.
    """
    if config.tenants.usage == "redis":
        yield from read_stream(redis_client(config), since=since)
    else:
        yield from read_usage(usage_folder(config), since=since)


def redis_client(config: ClusterConfig) -> Redis:
    return connect(config.redis.url, os.environ.get(PASSWORD_VARIABLE), timeout_s=TIMEOUT_S)
