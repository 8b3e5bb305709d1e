"""How much structure a request may have. Checking it and making objects of it takes the event loop, which all streams
of an ingress share: 600,000 messages of a character each held it for 38 s (docs/security.md).
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from google.protobuf.message import Message

MAX_DEPTH = 128
"""vLLM takes JSON schemas of 64 levels; what surrounds them has room."""
MAX_OBJECTS = 1 << 14
"""Objects and lists; a message with two parts has four. As many hold the loop for a second."""
MAX_VALUES = 1 << 21
"""Elements and members; a prompt of a million token ids has room."""

_STRINGS = re.compile(rb'"[^"\\]*(?:\\.[^"\\]*)*+(?:"|\Z)', re.DOTALL)
_STRINGS_AND_BRACKETS = re.compile(_STRINGS.pattern + rb"|[\[{}\]]", re.DOTALL)

_TOO_DEEP = f"nests deeper than {MAX_DEPTH} levels"
_TOO_MANY = f"holds more than {MAX_OBJECTS} objects and lists"
_TOO_LONG = f"holds more than {MAX_VALUES} values"


def json_excess(body: bytes) -> str:
    """What a JSON text does too much, as in "the body ..."; empty if nothing, or if it is no JSON.

    Cheap unless it has many brackets or commas; brackets in strings do not count.
    """
    if body.count(b"[") + body.count(b"{") > MAX_DEPTH and (excess := _bracket_excess(body)):
        return excess
    if body.count(b",") > MAX_VALUES and _STRINGS.sub(b"", body).count(b",") > MAX_VALUES:
        return _TOO_LONG
    return ""


def message_excess(message: Message) -> str:
    """The same of a protobuf message; protobuf has a bound of its own for the depth."""
    messages = values = 0
    left = [message]
    while left:
        for field, value in left.pop().ListFields():
            if isinstance(value, Message):
                messages += 1
                left.append(value)
            elif isinstance(value, (str, bytes, float, int)):
                continue
            elif field.message_type is None:
                values += len(value)
            else:
                messages += len(value)
                if messages > MAX_OBJECTS:
                    return _TOO_MANY
                parts = value.values() if isinstance(value, Mapping) else value
                left += [part for part in parts if isinstance(part, Message)]
    return _TOO_LONG if values > MAX_VALUES else ""


def _bracket_excess(body: bytes) -> str:
    depth = opened = 0
    for found in _STRINGS_AND_BRACKETS.finditer(body):
        first = body[found.start()]
        if first in b"[{":
            depth, opened = depth + 1, opened + 1
            if depth > MAX_DEPTH:
                return _TOO_DEEP
            if opened > MAX_OBJECTS:
                return _TOO_MANY
        elif first in b"]}":
            depth -= 1
    return ""
