"""What clients were promised: the proto as it was released, and what of it a change would break.

`python -m moeray.ingress.released` writes down the proto as it is; done at a release, never to make a test pass.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from google.protobuf.descriptor import Descriptor, FieldDescriptor, FileDescriptor

from moeray.ingress.generate import PROTO_ROOT
from moeray.v1 import inference_pb2

RELEASED = PROTO_ROOT / "moeray/v1/released.json"


def describe(proto: FileDescriptor) -> dict[str, Any]:
    """Everything that a client's generated code, or a message on the wire or as JSON, depends on."""
    return {
        "messages": {name: _message(message) for name, message in sorted(_all(proto.message_types_by_name).items())},
        "services": {
            f"{proto.package}.{service.name}": {method.name: _method(method) for method in service.methods}
            for service in proto.services_by_name.values()
        },
    }


def breaks(released: dict[str, Any], current: dict[str, Any]) -> list[str]:
    """What was released and is not there any more, or differs; what is new breaks nobody."""
    return [
        f"{kind[:-1]} {name}.{part}: was {was}, is {current[kind].get(name, {}).get(part, 'gone')}"
        for kind in ("messages", "services")
        for name, parts in released[kind].items()
        for part, was in parts.items()
        if current[kind].get(name, {}).get(part) != was
    ]


def _all(messages: Any) -> dict[str, Descriptor]:
    found: dict[str, Descriptor] = {}
    for message in messages.values():
        found |= {message.full_name: message, **_all(message.nested_types_by_name)}
    return found


def _message(message: Descriptor) -> dict[str, str]:
    return {str(field.number): _field(field) for field in message.fields}


def _field(field: FieldDescriptor) -> str:
    kind = field.message_type.full_name if field.message_type is not None else f"type {field.type}"
    oneof = field.containing_oneof
    label = "repeated" if field.is_repeated else "optional" if field.has_presence else "plain"
    place = f" of {oneof.name}" if oneof is not None and not oneof.name.startswith("_") else ""
    return f"{label} {kind} {field.name}{place}"


def _method(method: Any) -> str:
    streams = [" stream" if each else "" for each in (method.client_streaming, method.server_streaming)]
    return f"({method.input_type.full_name}{streams[0]}) -> ({method.output_type.full_name}{streams[1]})"


def write(path: Path = RELEASED) -> None:
    path.write_text(json.dumps(describe(inference_pb2.DESCRIPTOR), indent=1) + "\n")


if __name__ == "__main__":
    write()
