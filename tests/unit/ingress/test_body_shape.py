"""What a request may hold is counted outside its strings, and before anything is made of it."""

from __future__ import annotations

import json

import pytest
from google.protobuf.json_format import ParseDict

from moeray.ingress.body_shape import MAX_OBJECTS, MAX_VALUES, json_excess, message_excess
from moeray.v1 import inference_pb2 as pb


@pytest.mark.parametrize(
    ("body", "deep"),
    [
        (b"[" * 128 + b"]" * 128, False),
        (b'{"a":' * 129, True),
        (b"[]" * 1000, False),
        (b'["' + b"[" * 500 + b'"]', False),
        (b'["\\"' + b"[" * 500 + b'"]', False),
        (b'["\\\\"' + b"[" * 500, True),
        (b'"' + b"[" * 500, False),  # no JSON at all: the parser will say so
        (b"]" * 200 + b"[" * 128, False),
    ],
)
def test_depth_counts_brackets_outside_strings_only(body: bytes, deep: bool) -> None:
    assert ("deeper" in json_excess(body)) is deep


def chat(num_messages: int, content: str = "a") -> dict[str, object]:
    return {"messages": [{"role": "user", "content": content}] * num_messages}


def test_objects_are_bounded_and_those_in_a_text_are_not_counted() -> None:
    most = MAX_OBJECTS - 2  # the body and its list
    assert json_excess(json.dumps(chat(most)).encode()) == ""
    assert "objects and lists" in json_excess(json.dumps(chat(most + 1)).encode())
    assert json_excess(json.dumps(chat(1, json.dumps(chat(2 * most)))).encode()) == ""


def test_values_are_bounded() -> None:
    assert json_excess(json.dumps({"prompt": [1] * MAX_VALUES}).encode()) == ""
    assert "values" in json_excess(json.dumps({"prompt": [1] * (MAX_VALUES + 2)}).encode())
    assert json_excess(json.dumps({"prompt": "," * (MAX_VALUES + 2)}).encode()) == ""


def test_a_protobuf_message_has_the_same_bounds() -> None:
    assert message_excess(ParseDict(chat(MAX_OBJECTS), pb.ChatRequest())) == ""
    assert "objects and lists" in message_excess(ParseDict(chat(MAX_OBJECTS + 1), pb.ChatRequest()))
    parts = [{"type": "text", "text": "a"}] * MAX_OBJECTS
    message = {"role": "user", "content_parts": parts}
    assert "objects and lists" in message_excess(ParseDict({"messages": [message]}, pb.ChatRequest()))
    fields = {str(number): {"a": 1} for number in range(MAX_OBJECTS)}
    assert "objects and lists" in message_excess(ParseDict({"documents": [fields]}, pb.ChatRequest()))
    assert "values" in message_excess(pb.DetokenizeRequest(tokens=[1] * (MAX_VALUES + 1)))
    assert message_excess(pb.DetokenizeRequest(tokens=[1] * MAX_VALUES)) == ""
