"""cluster.yaml -> ClusterConfig, with errors a person can act on."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import TypeAdapter, ValidationError

from moeray.config.errors import ConfigError
from moeray.config.explain import explain
from moeray.config.schema import ClusterConfig


def load_config(path: Path | None) -> ClusterConfig:
    """Read one cluster.yaml; None means the defaults (the bundled demo cluster).

    Raises:
        ConfigError: unreadable file, bad YAML, unknown key, value of the wrong type or out of bounds.
    """
    if path is None:
        return ClusterConfig()
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: is not UTF-8 text (byte {error.start})") from error
    try:
        data = yaml.safe_load(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f" line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise ConfigError(f"{path}:{where} is not YAML: {getattr(error, 'problem', error)}") from error
    return parse_config({} if data is None else data, source=str(path))


def parse_config(data: object, *, source: str = "configuration") -> ClusterConfig:
    """Check a mapping as it comes from YAML, Helm values or Serve's application arguments.

    Raises:
        ConfigError: one line per wrong key, each naming the key and what would be right.
    """
    if not isinstance(data, Mapping):
        raise ConfigError(f"{source}: must be a mapping such as `model: moeray-tiny`, not {type(data).__name__}")
    try:
        return TypeAdapter(ClusterConfig).validate_python(data)
    except ValidationError as error:
        raise ConfigError("\n".join(f"{source}: {explain(item, ClusterConfig)}" for item in error.errors())) from error


def to_dict(config: ClusterConfig) -> dict[str, Any]:
    """The configuration as plain data: what `parse_config` accepts."""
    return dataclasses.asdict(config)
