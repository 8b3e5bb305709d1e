"""Bad input costs one clear error that names the field, in both protocols alike, and no other request anything."""

from __future__ import annotations

import json
import threading
from typing import Any

import grpc
import pytest
from front_process import MODEL, Ingress, chat
from google.protobuf.json_format import ParseDict
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from moeray.v1 import inference_pb2 as pb
from moeray.v1.inference_pb2_grpc import InferenceStub

USER = [{"role": "user", "content": "hi"}]
BAD: list[tuple[str, dict[str, Any], int, str]] = [
    ("unknown model", {"model": "gpt-5"}, 404, "model"),
    ("empty messages", {"messages": []}, 400, "messages"),
    ("unknown role", {"messages": [*USER, {"role": "alien", "content": "hi"}]}, 400, "messages.1.role"),
    (
        "prompt longer than the context",
        {"messages": [{"role": "user", "content": "word " * 9000}]},
        400,
        "messages",
    ),
    ("negative max_tokens", {"max_tokens": -1}, 400, "max_tokens"),
    ("huge max_tokens", {"max_tokens": 10**12}, 400, "max_tokens"),
    ("NaN temperature", {"temperature": float("nan")}, 400, "temperature"),
    ("infinite temperature", {"temperature": float("inf")}, 400, "temperature"),
    ("negative temperature", {"temperature": -1}, 400, "temperature"),
    ("NaN penalty", {"presence_penalty": float("nan")}, 400, "presence_penalty"),
    ("NaN bias", {"logit_bias": {"5": float("nan")}}, 400, "logit_bias.5"),
    ("no choice", {"n": 0}, 400, "n"),
    ("top_p out of range", {"top_p": 2.0}, 400, "top_p"),
    ("empty stop", {"stop": [""]}, 400, "stop"),
    ("logprobs not asked", {"top_logprobs": 2}, 400, "top_logprobs"),
    ("tool choice without tools", {"tool_choice": "required"}, 400, "tool_choice"),
]
_ids = [name for name, *_ in BAD]


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize(("name", "change", "status", "field"), BAD, ids=_ids)
def test_http_refuses_before_the_answer_begins_and_names_the_field(
    ingress: Ingress, name: str, change: dict[str, Any], status: int, field: str, stream: bool
) -> None:
    got, answer, _ = ingress.post("/v1/chat/completions", chat(stream=stream, **change))

    assert (got, answer["error"]["code"], answer["error"]["param"]) == (status, status, field), answer
    assert answer["error"]["message"] and answer["error"]["type"]


@pytest.mark.parametrize("method", ["Chat", "ChatStream"])
@pytest.mark.parametrize(("name", "change", "status", "field"), BAD, ids=_ids)
def test_grpc_refuses_with_a_status_that_names_the_field(
    ingress: Ingress, name: str, change: dict[str, Any], status: int, field: str, method: str
) -> None:
    change = dict(change)
    if (choice := change.pop("tool_choice", None)) is not None:
        change["tool_choice"] = {"mode": choice}
    message = ParseDict(chat(**_json_floats(change)), pb.ChatRequest())
    with grpc.insecure_channel(ingress.grpc) as channel, pytest.raises(grpc.RpcError) as refused:
        _whole(getattr(InferenceStub(channel), method)(message, timeout=30))

    code = grpc.StatusCode.NOT_FOUND if status == 404 else grpc.StatusCode.INVALID_ARGUMENT
    assert refused.value.code() is code, refused.value.details()
    rich = rpc_status.from_call(refused.value)
    assert rich is not None and rich.message == refused.value.details()
    violations = error_details_pb2.BadRequest()
    assert rich.details[0].Unpack(violations)
    assert violations.field_violations[0].field == field and violations.field_violations[0].description


@pytest.mark.parametrize(
    ("body", "names"),
    [
        (b'{"model": ', "JSON"),
        (b"", "body"),
        (b"[1, 2]", "body"),
        (json.dumps(chat(temperature="warm")).encode(), "temperature"),
        (json.dumps(chat(messages="hi")).encode(), "messages"),
        (json.dumps(chat(messages=[{"content": "hi"}])).encode(), "role"),
        (json.dumps(chat(max_tokens=1.5)).encode(), "max_tokens"),
        (json.dumps(chat(stream="maybe")).encode(), "stream"),
        (json.dumps(chat(messages=1)).encode(), '"param": "messages"'),
        (json.dumps(chat(messages=None)).encode(), '"param": "messages"'),
        (json.dumps(chat(tools=1)).encode(), '"param": "tools'),
        (json.dumps(chat(structured_outputs="x")).encode(), '"param": "structured_outputs"'),
        (json.dumps(chat(structured_outputs=[])).encode(), '"param": "structured_outputs"'),
    ],
    ids=[
        "cut off",
        "empty",
        "a list",
        "temperature",
        "messages",
        "no role",
        "max_tokens",
        "stream",
        "messages 1",
        "no messages",
        "tools",
        "text for a constraint",
        "a list for a constraint",
    ],
)
def test_a_body_of_the_wrong_shape_is_a_400_with_an_error_object(ingress: Ingress, body: bytes, names: str) -> None:
    status, answer, _ = ingress.post("/v1/chat/completions", body)

    assert status == 400, answer
    assert names in json.dumps(answer["error"]), answer


def test_a_path_that_is_not_there_has_an_error_object_and_leads_nowhere(ingress: Ingress) -> None:
    for path in ("/v1/nothing", "/v1/chat/completions/"):
        status, answer, _ = ingress.post(path, chat())
        assert (status, answer["error"]["code"]) == (404, 404), path


def test_what_would_steer_one_local_engine_is_not_there(ingress: Ingress) -> None:
    for path in (
        "/sleep",
        "/invocations",
        "/scale_elastic_ep",
        "/inference/v1/generate",
        "/v1/load_lora_adapter",
        "/start_profile",
    ):
        assert ingress.post(path, {})[0] == 404, path


def test_bad_requests_do_not_disturb_a_running_one(ingress: Ingress) -> None:
    good = chat(max_tokens=120, ignore_eos=True)
    alone = ingress.post("/v1/chat/completions", good)[1]["choices"]
    answers: list[Any] = []
    thread = threading.Thread(target=lambda: answers.append(ingress.post("/v1/chat/completions", good)))
    thread.start()
    refused = 0
    while thread.is_alive():
        for change in ({"messages": []}, {"temperature": float("nan")}, {"model": "gpt-5"}):
            assert ingress.post("/v1/chat/completions", chat(**change))[0] in (400, 404)
            refused += 1
    assert refused > 3 and answers[0][1]["choices"] == alone


def _whole(answer: Any) -> Any:
    """Read a stream to its end; a unary answer is there already."""
    return answer if isinstance(answer, pb.ChatResponse) else list(answer)


def _json_floats(change: dict[str, Any]) -> dict[str, Any]:
    """protobuf's JSON writes NaN as a string."""
    return json.loads(json.dumps(change).replace("NaN", '"NaN"').replace("Infinity", '"Infinity"'))


def test_what_no_engine_can_be_sent_is_refused_as_any_other_value(ingress: Ingress) -> None:
    for path, ask, field in (
        ("/v1/chat/completions", chat(thinking_token_budget=2**64), "thinking_token_budget"),
        ("/v1/chat/completions", chat(chat_template_kwargs={"a": -(2**64)}), "chat_template_kwargs"),
        ("/v1/completions", {"model": MODEL, "prompt": "hi", "thinking_token_budget": 2**64}, "thinking_token_budget"),
        ("/v1/completions", {"model": MODEL, "prompt": "hi", "session_id": "\ud800", "stream": True}, "session_id"),
        ("/v1/responses", {"model": MODEL, "input": "hi", "request_id": "\ud800"}, "request_id"),
    ):
        status, answer, _ = ingress.post(path, ask)
        assert (status, answer["error"]["param"]) == (400, field), answer


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions", "/v1/messages"])
def test_a_field_that_breaks_vllms_own_validators_is_the_clients_error(ingress: Ingress, path: str) -> None:
    base = chat() if path != "/v1/completions" else {"model": MODEL, "prompt": "hi"}
    for field in ("structured_outputs", "stream_options", "tools", "tool_choice", "messages", "response_format"):
        for value in ([], {}, "a", 1, True, [None], [[]], {"type": []}):
            status, answer, _ = ingress.post(path, {**base, field: value, "max_tokens": 1})
            assert status in (200, 400), (field, value, answer)
