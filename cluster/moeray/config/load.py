"""cluster.yaml -> ClusterConfig, with errors a person can act on."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_type_hints

import yaml
from pydantic import TypeAdapter, ValidationError

from moeray.config.errors import ConfigError
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
        raise ConfigError("\n".join(f"{source}: {_explain(item)}" for item in error.errors())) from error


def to_dict(config: ClusterConfig) -> dict[str, Any]:
    """The configuration as plain data: what `parse_config` accepts."""
    return dataclasses.asdict(config)


def _explain(item: Mapping[str, Any]) -> str:
    if item["type"] == "value_error":
        return str(item["ctx"]["error"])  # a rule over several keys: it names them itself
    key = ".".join(str(part) for part in item["loc"]) or "file"
    if item["type"] in ("unexpected_keyword_argument", "extra_forbidden"):
        known = _known_keys(item["loc"][:-1])
        near = difflib.get_close_matches(str(item["loc"][-1]), known, n=1)
        hint = f"did you mean {near[0]}?" if near else f"known keys here: {', '.join(known)}"
        return f"{key}: unknown key; {hint}"
    return f"{key}: {item['msg'][0].lower()}{item['msg'][1:]} (got {item['input']!r})"


def _known_keys(path: tuple[int | str, ...]) -> list[str]:
    node: Any = ClusterConfig
    for part in path:
        node = get_type_hints(node).get(str(part))
        if not dataclasses.is_dataclass(node):
            return []
    return [field.name for field in dataclasses.fields(node)]
