"""One question, asked as a user of each API asks it; every answer in the form of OpenAI's JSON."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import cached_property
from typing import Any

import grpc
from answers import Answer
from anthropic import Anthropic
from front_process import Ingress
from google.protobuf.json_format import ParseDict
from openai import OpenAI

from moeray.ingress.convert import to_json
from moeray.v1 import inference_pb2 as pb
from moeray.v1.inference_pb2_grpc import InferenceStub

TIMEOUT_S = 120


class Clients:
    """The SDKs and a stub, all of one ingress."""

    def __init__(self, ingress: Ingress) -> None:
        self.ingress = ingress

    @cached_property
    def openai(self) -> OpenAI:
        return OpenAI(base_url=f"{self.ingress.http}/v1", api_key="none", max_retries=0, timeout=TIMEOUT_S)

    @cached_property
    def anthropic(self) -> Anthropic:
        return Anthropic(base_url=self.ingress.http, api_key="none", max_retries=0, timeout=TIMEOUT_S)

    @cached_property
    def stub(self) -> InferenceStub:
        return InferenceStub(grpc.insecure_channel(self.ingress.grpc))

    # ---- HTTP, by OpenAI's SDK

    def chat(self, ask: dict[str, Any], *, stream: bool) -> Answer:
        return _collect(_call(self.openai.chat.completions.create, ask, stream), stream)

    def complete(self, ask: dict[str, Any], *, stream: bool) -> Answer:
        return _collect(_call(self.openai.completions.create, ask, stream), stream)

    # ---- gRPC

    def grpc_chat(self, ask: dict[str, Any], *, stream: bool) -> Answer:
        method = self.stub.ChatStream if stream else self.stub.Chat
        return _collect_messages(method(chat_message(ask), timeout=TIMEOUT_S), stream)

    def grpc_complete(self, ask: dict[str, Any], *, stream: bool) -> Answer:
        method = self.stub.CompleteStream if stream else self.stub.Complete
        return _collect_messages(method(completion_message(ask), timeout=TIMEOUT_S), stream)


def _call(create: Callable[..., Any], ask: dict[str, Any], stream: bool) -> Any:
    """What the SDK has no parameter for goes where its documentation says."""
    known = inspect.signature(create).parameters
    own = {key: value for key, value in ask.items() if key in known}
    more = {key: value for key, value in ask.items() if key not in known}
    return create(**own, **({"stream": True} if stream else {}), extra_body=more or None)


def _collect(answered: Any, stream: bool) -> Answer:
    answer = Answer()
    for message in answered if stream else (answered,):
        _add(answer, message.to_dict())
    return answer


def _collect_messages(answered: Any, stream: bool) -> Answer:
    answer = Answer()
    for message in answered if stream else (answered,):
        data = to_json(message)
        if "usage" in data:  # proto3 has no wire form for zero
            data["usage"] = {"completion_tokens": 0, **data["usage"]}
        for choice in data.get("choices", ()):
            choice.setdefault("index", 0)
            for token in (choice.get("logprobs") or {}).get("content", ()):
                token.setdefault("logprob", 0.0)
        _add(answer, data)
    return answer


def _add(answer: Answer, message: dict[str, Any]) -> None:
    """`answer.messages` has each message as it came."""
    answer.add(message)
    answer.messages.append(message)


def chat_message(ask: dict[str, Any]) -> pb.ChatRequest:
    """The same request as protobuf: where JSON has two forms, the proto has two fields."""
    ask = dict(ask)
    if isinstance(stop := ask.get("stop"), str):
        ask["stop"] = [stop]
    if (choice := ask.get("tool_choice")) is not None:
        ask["tool_choice"] = {"mode": choice} if isinstance(choice, str) else {"function": choice["function"]}
    ask["messages"] = [_parts(message) for message in ask["messages"]]
    return ParseDict(ask, pb.ChatRequest())


def _parts(message: dict[str, Any]) -> dict[str, Any]:
    if isinstance(message.get("content"), list):
        return {"content_parts": message["content"], **{key: message[key] for key in message if key != "content"}}
    return message


def completion_message(ask: dict[str, Any]) -> pb.CompletionRequest:
    """As `chat_message`."""
    ask = dict(ask)
    prompt = ask.pop("prompt")
    match prompt:
        case str():
            ask["prompt"] = [prompt]
        case [int(), *_]:
            ask["prompt_token_ids"] = {"ids": prompt}
        case [list(), *_]:
            ask["prompts_token_ids"] = [{"ids": each} for each in prompt]
        case _:
            ask["prompt"] = prompt
    return ParseDict(ask, pb.CompletionRequest())
