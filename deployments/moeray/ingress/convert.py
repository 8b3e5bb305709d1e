"""Between `moeray.v1` messages and the OpenAI JSON that vLLM's handlers take and give.

The proto's field names are OpenAI's, so the conversion walks the descriptors and knows only the exceptions: the fields
where JSON has two forms and the proto has two fields (content, prompt, tool_choice), maps by token id, and bytes. An
unset field is an absent key; nothing here has a default of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message
from google.protobuf.struct_pb2 import ListValue, NullValue, Struct, Value

from moeray.v1 import inference_pb2 as pb

M = TypeVar("M", bound=Message)

# ---- proto -> JSON ------------------------------------------------------------------------------------------------


def to_json(message: Message) -> dict[str, Any]:
    """The OpenAI JSON object of a message, set fields only.

    Raises:
        ValueError: a Struct holds a number that JSON cannot (NaN, infinity).
    """
    data: dict[str, Any] = {}
    for field, value in message.ListFields():
        data[field.name] = _field_to_json(field, value)
    fix = _TO_JSON.get(type(message))
    return data if fix is None else fix(data)


def _field_to_json(field: FieldDescriptor, value: Any) -> Any:
    if field.message_type is not None and field.message_type.GetOptions().map_entry:
        return dict(value)
    if field.is_repeated:
        return [_one_to_json(item) for item in value]
    return _one_to_json(value)


def _one_to_json(value: Any) -> Any:
    if isinstance(value, Struct):
        # A protobuf map has no order of its own: without one, equal tools would be rendered as different prompts.
        return {key: _one_to_json(value.fields[key]) for key in sorted(value.fields)}
    if isinstance(value, ListValue):
        return [_one_to_json(item) for item in value.values]
    if isinstance(value, Value):
        kind = value.WhichOneof("kind")
        return None if kind in (None, "null_value") else _one_to_json(getattr(value, kind))
    if isinstance(value, Message):
        return to_json(value)
    if isinstance(value, float) and value.is_integer():
        return int(value)  # Struct has only doubles; a JSON schema's `minItems: 2.0` is not an integer
    return value


def _message_to_json(data: dict[str, Any]) -> dict[str, Any]:
    data.setdefault("role", "")
    if (parts := data.pop("content_parts", None)) is not None and "content" not in data:
        data["content"] = parts
    return data


def _tool_to_json(data: dict[str, Any]) -> dict[str, Any]:
    data.setdefault("type", "function")
    return data


def _chat_to_json(data: dict[str, Any]) -> dict[str, Any]:
    data.setdefault("messages", [])
    if (choice := data.get("tool_choice")) is not None:
        data["tool_choice"] = choice.get("mode", "") if "function" not in choice else {"type": "function", **choice}
    return data


def _completion_to_json(data: dict[str, Any]) -> dict[str, Any]:
    prompts = data.pop("prompt", None)
    several = data.pop("prompts_token_ids", None)
    if (token_ids := data.pop("prompt_token_ids", None)) is not None:
        data["prompt"] = token_ids.get("ids", [])
    elif several is not None:
        data["prompt"] = [each.get("ids", []) for each in several]
    elif prompts is not None:
        data["prompt"] = prompts[0] if len(prompts) == 1 else prompts
    return data


def _schema_to_json(data: dict[str, Any]) -> dict[str, Any]:
    data.setdefault("name", "")
    return data


_TO_JSON: dict[type[Message], Callable[[dict[str, Any]], dict[str, Any]]] = {
    pb.ChatMessage: _message_to_json,
    pb.Tool: _tool_to_json,
    pb.ToolCall: _tool_to_json,
    pb.ChatRequest: _chat_to_json,
    pb.CompletionRequest: _completion_to_json,
    pb.JsonSchema: _schema_to_json,
}

# ---- JSON -> proto ------------------------------------------------------------------------------------------------


def fill(message: M, data: Mapping[str, Any]) -> M:
    """Set the fields of `message` from a JSON object; nulls and keys the proto does not have are left out."""
    fields = message.DESCRIPTOR.fields_by_name
    for key, value in data.items():
        if value is None or (field := fields.get(key)) is None:
            continue
        if field.message_type is not None and field.message_type.GetOptions().map_entry:
            getattr(message, key).update(value)
        elif field.is_repeated:
            _extend(getattr(message, key), field, value)
        elif field.message_type is not None:
            _fill_one(getattr(message, key), value)
        else:
            setattr(message, key, bytes(value) if field.type == FieldDescriptor.TYPE_BYTES else value)
    return message


def _extend(target: Any, field: Any, values: Iterable[Any]) -> None:
    if field.message_type is None:
        target.extend(values)
    else:
        for value in values:
            _fill_one(target.add(), value)


def _fill_one(message: Message, value: Any) -> None:
    if isinstance(message, pb.PromptPosition):
        _fill_position(message, value or {})
    elif isinstance(message, Struct):
        message.SetInParent()
        for key, item in (value or {}).items():  # null: the first token of a prompt has no alternatives
            _fill_one(message.fields[key], item)
    elif isinstance(message, ListValue):
        message.SetInParent()
        for item in value:
            _fill_one(message.values.add(), item)
    elif isinstance(message, Value):
        _fill_value(message, value)
    else:
        message.SetInParent()
        fill(message, value)


def _fill_position(message: pb.PromptPosition, logprobs: Mapping[Any, Mapping[str, Any]]) -> None:
    """JSON has a map from the token's id, and null for the first position."""
    for token_id, logprob in logprobs.items():
        fill(message.tokens.add(token_id=int(token_id)), logprob)


def _fill_value(message: Value, value: Any) -> None:
    if value is None:
        message.null_value = NullValue.NULL_VALUE
    elif isinstance(value, bool):
        message.bool_value = value
    elif isinstance(value, int | float):
        message.number_value = value
    elif isinstance(value, str):
        message.string_value = value
    else:
        _fill_one(message.list_value if isinstance(value, list | tuple) else message.struct_value, value)
