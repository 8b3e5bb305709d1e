"""Rows that are no chat and no completion: models, tokens, the other HTTP protocols, batches, errors."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import anthropic
import grpc
import openai
import pytest
from conformance.clients import TIMEOUT_S, Clients, chat_message
from conformance.features import ANSWER, HTTP_ONLY, TOOLS, WEATHER, Feature, Holds
from front_process import MODEL, chat, until
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from moeray.v1 import inference_pb2 as pb

PROMPT_IDS = [756, 982]


def _equals(expected: Any) -> Holds:
    def holds(found: Any) -> None:
        assert found == expected, found

    return holds


# ---- models and tokens


def _post(clients: Clients, path: str, body: dict[str, Any]) -> dict[str, Any]:
    return clients.openai.post(path=f"{clients.ingress.http}{path}", body=body, cast_to=dict)


CHAT_TO_TOKENIZE = {"messages": chat()["messages"], "chat_template_kwargs": {"thinking": False}}
TOKENS = [
    Feature(
        "Models and tokens",
        "list of models",
        lambda c: [model.id for model in c.openai.models.list().data],
        lambda c: [model.id for model in c.stub.ListModels(pb.ListModelsRequest(), timeout=TIMEOUT_S).data],
        _equals([MODEL]),
    ),
    Feature(
        "Models and tokens",
        "tokenize a text",
        lambda c: _post(c, "/tokenize", {"model": MODEL, "prompt": "hi there"})["tokens"],
        lambda c: list(c.stub.Tokenize(pb.TokenizeRequest(model=MODEL, prompt="hi there")).tokens),
        _equals(PROMPT_IDS),
    ),
    Feature(
        "Models and tokens",
        "tokenize a chat",
        lambda c: _post(c, "/tokenize", {"model": MODEL, **CHAT_TO_TOKENIZE})["count"],
        lambda c: c.stub.Tokenize(_tokenize_chat()).count,
        _equals(10),
    ),
    Feature(
        "Models and tokens",
        "detokenize",
        lambda c: _post(c, "/detokenize", {"model": MODEL, "tokens": PROMPT_IDS})["prompt"],
        lambda c: c.stub.Detokenize(pb.DetokenizeRequest(model=MODEL, tokens=PROMPT_IDS)).prompt,
        _equals("hi there"),
    ),
]


def _tokenize_chat() -> pb.TokenizeRequest:
    asked = chat_message(chat())
    return pb.TokenizeRequest(model=MODEL, messages=asked.messages, chat_template_kwargs=asked.chat_template_kwargs)


# ---- responses

RESPONSE: dict[str, Any] = {"model": MODEL, "input": "What is an expert group?", "temperature": 0}
RESPONSE_TOOLS = [{"type": "function", **tool["function"]} for tool in TOOLS]


def _responses(name: str, ask: dict[str, Any], holds: Holds) -> Feature:
    def http(clients: Clients) -> Any:
        return clients.openai.responses.create(**{"max_output_tokens": 60, **RESPONSE, **ask})

    return Feature("Responses", name, http, HTTP_ONLY, holds)


def _response_says(answer: Any) -> None:
    assert answer.output_text == ANSWER and answer.status == "completed", answer
    assert answer.usage.input_tokens == 88 and answer.usage.output_tokens_details.reasoning_tokens == 5, answer.usage


def _response_streams(events: Any) -> None:
    events = list(events)
    kinds = [event.type for event in events]
    assert kinds[0] == "response.created" and kinds[-1] == "response.completed", kinds
    assert "".join(event.delta for event in events if event.type == "response.output_text.delta") == ANSWER
    assert events[-1].response.usage.output_tokens == 25


def _response_calls(answer: Any) -> None:
    (call,) = (item for item in answer.output if item.type == "function_call")
    assert (call.name, json.loads(call.arguments)) == ("get_weather", {"city": "Lisbon"})


def _instructed(answer: Any) -> None:
    assert answer.usage.input_tokens > 88, answer.usage


RESPONSES = [
    _responses("whole", {}, _response_says),
    _responses("streamed", {"stream": True}, _response_streams),
    _responses("instructions", {"instructions": "Answer briefly."}, _instructed),
    _responses("tools", {"input": WEATHER[0]["content"], "tools": RESPONSE_TOOLS, "max_output_tokens": 90},
               _response_calls),
    _responses("effort", {"reasoning": {"effort": "none"}},
               lambda a: _equals([ANSWER, 0])([a.output_text, a.usage.output_tokens_details.reasoning_tokens])),
    _responses(
        "structured text",
        {
            "reasoning": {"effort": "none"},
            "text": {"format": {"type": "json_schema", "name": "size", "schema": {"enum": ["small", "large"]}}},
        },
        lambda a: _equals(True)(a.output_text in ('"small"', '"large"')),
    ),
    Feature(
        "Responses",
        "stored responses, `previous_response_id`, background",
        "vLLM keeps them in one process' memory, off unless asked for; ingresses share no such memory",
        HTTP_ONLY,
        _equals(None),
    ),
]  # fmt: skip

# ---- Anthropic's messages

ANTHROPIC_TOOLS = [
    {
        "name": tool["function"]["name"],
        "description": tool["function"]["description"],
        "input_schema": tool["function"]["parameters"],
    }
    for tool in TOOLS
]
MESSAGE: dict[str, Any] = {"model": MODEL, "max_tokens": 60, "messages": chat()["messages"]}
SILENT: dict[str, Any] = {"thinking": {"type": "disabled"}}


def _messages(name: str, ask: dict[str, Any], holds: Holds, method: str = "create") -> Feature:
    def http(clients: Clients) -> Any:
        return getattr(clients.anthropic.messages, method)(**{**MESSAGE, **ask})

    return Feature("Anthropic's messages", name, http, HTTP_ONLY, holds)


def _message_says(answer: Any) -> None:
    assert [block.text for block in answer.content] == [ANSWER] and answer.stop_reason == "end_turn", answer
    assert answer.usage.input_tokens + (answer.usage.cache_read_input_tokens or 0) == 10
    assert answer.usage.output_tokens == 19


def _message_thinks(answer: Any) -> None:
    thought, text = answer.content
    assert (thought.type, thought.thinking, text.text) == ("thinking", "I know this fact.", ANSWER)


def _message_streams(manager: Any) -> None:
    with manager as stream:
        assert "".join(stream.text_stream) == ANSWER
        assert stream.get_final_message().usage.output_tokens == 19


def _message_calls(answer: Any) -> None:
    (call,) = answer.content
    assert (call.type, call.name, call.input, answer.stop_reason) == (
        "tool_use", "get_weather", {"city": "Lisbon"}, "tool_use"
    )  # fmt: skip


def _streamed_call(manager: Any) -> None:
    with manager as stream:
        _message_calls(stream.get_final_message())


TOOL_RESULT = [
    *WEATHER,
    {
        "role": "assistant",
        "content": [{"type": "tool_use", "id": "call_0", "name": "get_weather", "input": {"city": "Lisbon"}}],
    },
    {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "call_0", "content": "sunny"}]},
]


def _counted(clients: Clients) -> int:
    counted = clients.anthropic.messages.count_tokens(model=MODEL, messages=chat()["messages"])
    return counted.input_tokens


MESSAGES = [
    _messages("whole", SILENT, _message_says),
    _messages("thinking", {}, _message_thinks),
    _messages("streamed", SILENT, _message_streams, "stream"),
    _messages("tools", {**SILENT, "messages": WEATHER, "tools": ANTHROPIC_TOOLS}, _message_calls),
    _messages("tools, streamed", {**SILENT, "messages": WEATHER, "tools": ANTHROPIC_TOOLS}, _streamed_call, "stream"),
    _messages("a tool's result", {**SILENT, "messages": TOOL_RESULT, "tools": ANTHROPIC_TOOLS},
              lambda a: _equals("It is sunny in Lisbon.")(a.content[0].text)),
    _messages("stop sequences", {**SILENT, "stop_sequences": ["process"]},
              lambda a: _equals(["stop_sequence", "process"])([a.stop_reason, a.stop_sequence])),
    Feature("Anthropic's messages", "count_tokens", _counted, HTTP_ONLY, _equals(88)),
]  # fmt: skip

# ---- batches


def _batched(clients: Clients) -> list[Any]:
    lines = [
        {"custom_id": str(number), "method": "POST", "url": "/v1/chat/completions", "body": chat(max_tokens=number)}
        for number in (3, 4)
    ]
    files, batches = clients.openai.files, clients.openai.batches
    sent = files.create(file=("ask.jsonl", "\n".join(map(json.dumps, lines)).encode()), purpose="batch")
    batch = batches.create(input_file_id=sent.id, endpoint="/v1/chat/completions", completion_window="24h")
    until(lambda: batches.retrieve(batch.id).status in ("completed", "failed"), TIMEOUT_S)
    ended = batches.retrieve(batch.id)
    assert ended.output_file_id is not None, ended
    answers = [json.loads(line) for line in files.content(ended.output_file_id).text.splitlines()]
    return sorted((each["custom_id"], each["response"]["body"]["usage"]["completion_tokens"]) for each in answers)


BATCHES = [
    Feature(
        "Batches",
        "files and batches, below all other work",
        _batched,
        "files are HTTP's; a gRPC client streams, and sets `priority`",
        _equals([("3", 3), ("4", 4)]),
    )
]

# ---- errors


def _read(answer: Any) -> None:
    """A stream to its end; whatever is no stream is there already."""
    for _ in answer if hasattr(answer, "__next__") else ():
        pass


def _http_error(call: Callable[[Clients], Any]) -> Callable[[Clients], Any]:
    def asked(clients: Clients) -> tuple[int, Any]:
        try:
            _read(call(clients))
        except openai.APIStatusError as error:
            return error.status_code, error.param
        except anthropic.APIStatusError as error:
            return error.status_code, error.body
        raise AssertionError("no error")

    return asked


_AS_HTTP = {grpc.StatusCode.INVALID_ARGUMENT: 400, grpc.StatusCode.NOT_FOUND: 404}


def _grpc_error(message: pb.ChatRequest, method: str) -> Callable[[Clients], Any]:
    def asked(clients: Clients) -> tuple[int, str]:
        call = getattr(clients.stub, method)
        with pytest.raises(grpc.RpcError) as refused:
            _read(call(message, timeout=TIMEOUT_S))
        rich, violations = rpc_status.from_call(refused.value), error_details_pb2.BadRequest()
        assert rich is not None and rich.details[0].Unpack(violations), refused.value
        return _AS_HTTP[refused.value.code()], violations.field_violations[0].field

    return asked


def _errors(name: str, change: dict[str, Any], status: int, field: str) -> list[Feature]:
    ask = {**chat(), **change}
    own = {key: value for key, value in ask.items() if key in ("model", "messages", "n", "temperature", "logprobs")}
    more = {key: value for key, value in ask.items() if key not in own}

    def http(stream: bool) -> Callable[[Clients], Any]:
        return _http_error(lambda c: c.openai.chat.completions.create(**own, stream=stream, extra_body=more))

    return [
        Feature("Errors", name + suffix, http(stream), _grpc_error(chat_message(ask), method),
                _equals((status, field)))
        for suffix, stream, method in (("", False, "Chat"), (", streamed", True, "ChatStream"))
    ]  # fmt: skip


ERRORS = [
    *_errors("a model that is not there", {"model": "gpt-5"}, 404, "model"),
    *_errors("no model", {"model": ""}, 400, "model"),
    *_errors("no messages", {"messages": []}, 400, "messages"),
    *_errors("an unknown role", {"messages": [{"role": "alien", "content": "hi"}]}, 400, "messages.0.role"),
    *_errors("too many choices", {"n": 129, "temperature": 1}, 400, "n"),
    *_errors("n with greedy sampling", {"n": 2}, 400, "n"),
    *_errors("a sampling parameter out of range", {"top_k": -7}, 400, "top_k"),
    *_errors("min_tokens above max_tokens", {"min_tokens": 50}, 400, "min_tokens"),
    *_errors("a token id out of range", {"logit_bias": {"99999": 1}}, 400, "logit_bias"),
    *_errors("a regex that does not parse", {"structured_outputs": {"regex": "("}}, 400, "structured_outputs"),
    *_errors(
        "a grammar that does not parse", {"structured_outputs": {"grammar": "root ::="}}, 400,
        "structured_outputs.grammar",
    ),
    *_errors(
        "a schema that is none",
        {"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": {"type": "banana"}}}},
        400, "response_format",
    ),
    *_errors("an image to a model of text", {
        "messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:,"}}]}]
    }, 400, "messages"),
    Feature(
        "Errors", "a response's, streamed",
        _http_error(lambda c: c.openai.responses.create(
            **RESPONSE, stream=True, extra_body={"logit_bias": {"99999": 1}})),
        HTTP_ONLY, _equals((400, "logit_bias")),
    ),
    Feature(
        "Errors", "a message's, in Anthropic's form",
        _http_error(lambda c: c.anthropic.messages.create(**{**MESSAGE, "stop_sequences": [""]})),
        HTTP_ONLY,
        lambda found: _equals((400, "error", True))(
            (found[0], found[1]["type"], "stop_sequences" in found[1]["error"]["message"])
        ),
    ),
]  # fmt: skip
