"""`moeray chat`: one question, the answer as it comes; gRPC by default, the OpenAI API with --http."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from collections.abc import Iterator
from typing import Any

from moeray.cli.connection import endpoints
from moeray.cli.errors import CommandError

TIMEOUT_S = 300.0


def chat(question: str, *, http: bool, api_key: str | None, max_tokens: int, thinking: bool) -> int:
    url, target = endpoints()
    if http:
        pieces = ask_http(url, question, api_key=api_key, max_tokens=max_tokens, thinking=thinking)
    else:
        pieces = ask_grpc(target, question, api_key=api_key, max_tokens=max_tokens, thinking=thinking)
    for piece in pieces:
        print(piece, end="", flush=True)
    print()
    return 0


def ask_http(
    url: str, question: str, *, api_key: str | None = None, max_tokens: int = 256, thinking: bool = False
) -> Iterator[str]:
    """Stream one answer of `POST {url}/v1/chat/completions`, piece by piece (reasoning first, if any).

    Raises:
        CommandError: the server does not answer, or answers with an error object.
    """
    model = _get(f"{url}/v1/models", api_key)["data"][0]["id"]
    body = {
        "model": model,
        "messages": [{"role": "user", "content": question}],
        "temperature": 0,
        "max_tokens": max_tokens,
        "stream": True,
        "chat_template_kwargs": {"thinking": thinking},
    }
    with _open(f"{url}/v1/chat/completions", api_key, json.dumps(body).encode()) as answer:
        for line in answer:
            text = line.decode().removeprefix("data: ").strip()
            if not text or text == "[DONE]":
                continue
            event = json.loads(text)
            if "error" in event:
                raise CommandError(event["error"]["message"])
            for choice in event["choices"]:
                delta = choice["delta"]
                if piece := (delta.get("reasoning") or "") + (delta.get("content") or ""):
                    yield piece


def ask_grpc(
    target: str, question: str, *, api_key: str | None = None, max_tokens: int = 256, thinking: bool = False
) -> Iterator[str]:
    """Stream one answer of `moeray.v1.Inference/ChatStream`, piece by piece (reasoning first, if any).

    Raises:
        CommandError: the server does not answer, or answers with a status other than OK.
    """
    import grpc

    from moeray.v1 import inference_pb2, inference_pb2_grpc

    metadata = [("authorization", f"Bearer {api_key}")] if api_key else []
    try:
        with grpc.insecure_channel(target) as channel:
            stub = inference_pb2_grpc.InferenceStub(channel)
            models = stub.ListModels(inference_pb2.ListModelsRequest(), metadata=metadata, timeout=TIMEOUT_S)
            request = inference_pb2.ChatRequest(
                model=models.data[0].id,
                messages=[inference_pb2.ChatMessage(role="user", content=question)],
                temperature=0,
                max_tokens=max_tokens,
            )
            request.chat_template_kwargs["thinking"] = thinking
            for chunk in stub.ChatStream(request, metadata=metadata, timeout=TIMEOUT_S):
                for choice in chunk.choices:
                    if piece := choice.delta.reasoning + choice.delta.content:
                        yield piece
    except grpc.RpcError as error:
        raise CommandError(f"gRPC {target}: {error.code().name}: {error.details()}") from error


def _get(url: str, api_key: str | None) -> Any:
    with _open(url, api_key, None) as answer:
        return json.loads(answer.read())


def _open(url: str, api_key: str | None, body: bytes | None) -> Any:
    headers = {"content-type": "application/json"} | ({"authorization": f"Bearer {api_key}"} if api_key else {})
    try:
        return urllib.request.urlopen(urllib.request.Request(url, body, headers), timeout=TIMEOUT_S)  # noqa: S310
    except urllib.error.HTTPError as error:
        text = error.read().decode(errors="replace")
        try:
            message = json.loads(text)["error"]["message"]
        except (ValueError, KeyError, TypeError):
            message = text[:500]
        raise CommandError(f"HTTP {error.code}: {message}") from error
    except urllib.error.URLError as error:
        raise CommandError(f"{url} does not answer: {error.reason}") from error
