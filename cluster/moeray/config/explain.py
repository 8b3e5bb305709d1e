"""What pydantic finds wrong with a file, in words that name the key and what would be right."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping
from typing import Any, get_type_hints


def explain(item: Mapping[str, Any], root: type) -> str:
    """One of `ValidationError.errors()`.

    Args:
        root: the dataclass that the file was to become; its fields' names are the keys that are known.
    """
    if item["type"] == "value_error":
        return str(item["ctx"]["error"])  # a rule over several keys: it names them itself
    key = ".".join(str(part) for part in item["loc"]) or "file"
    if item["type"] in ("unexpected_keyword_argument", "extra_forbidden"):
        known = _known_keys(root, item["loc"][:-1])
        near = difflib.get_close_matches(str(item["loc"][-1]), known, n=1)
        hint = f"did you mean {near[0]}?" if near else f"known keys here: {', '.join(known)}"
        return f"{key}: unknown key; {hint}"
    if item["type"] in ("missing", "missing_argument"):
        return f"{key}: is missing"
    return f"{key}: {item['msg'][0].lower()}{item['msg'][1:]} (got {item['input']!r})"


def _known_keys(root: type, path: tuple[int | str, ...]) -> list[str]:
    node: Any = root
    for part in path:
        node = get_type_hints(node).get(str(part))
        if not dataclasses.is_dataclass(node):
            return []
    return [field.name for field in dataclasses.fields(node)]
