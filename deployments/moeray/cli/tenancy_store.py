"""Where a cluster's tenants and usage records are, for the commands."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from moeray.cli import state_file
from moeray.config import ClusterConfig
from moeray.controller.store import PASSWORD_VARIABLE
from moeray.tenancy import RosterStore, connect, open_roster, read_stream, read_usage

TIMEOUT_S = 10.0
"""A person waits: longer than an ingress does."""


def placed(config: ClusterConfig) -> ClusterConfig:
    """With the absolute path of everything that tenancy keeps in files: what is not set is in the state directory."""
    tenants, state = config.tenants, state_file.state_dir()
    defaults = {"secret_file": state / "secret", "usage_dir": state / "usage"}
    if not config.redis.url:
        defaults["file"] = state / "tenants.yaml"
    paths = {name: getattr(tenants, name) or str(defaults.get(name, "")) for name in (*defaults, "file", "jwks_file")}
    absolute: dict[str, Any] = {name: str(Path(path).expanduser().absolute()) for name, path in paths.items() if path}
    return replace(config, tenants=replace(tenants, **absolute))


def roster_of(config: ClusterConfig) -> RosterStore:
    """The tenants of a `placed` configuration. Reaches nothing yet."""
    return open_roster(config, os.environ.get(PASSWORD_VARIABLE), timeout_s=TIMEOUT_S)


def usage_lines(config: ClusterConfig, since: float) -> Iterator[bytes | str]:
    """Records of a `placed` configuration from `since` (seconds since 1970) on, and some before it.

    Raises:
        OSError: they cannot be read.
    """
    if config.tenants.usage == "redis":
        password = os.environ.get(PASSWORD_VARIABLE)
        yield from read_stream(connect(config.redis.url, password, timeout_s=TIMEOUT_S), since=since)
    else:
        yield from read_usage(Path(config.tenants.usage_dir), since=since)
