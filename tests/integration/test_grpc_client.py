"""What docs/grpc.md shows works as it is printed, and requests with the same name do not know of each other."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import urllib.request
from pathlib import Path
from typing import Any

import grpc
import httpx
import openai
import pytest
from front_process import MODEL, Ingress, ShardProcess, chat, until
from google.protobuf.json_format import ParseDict

import moeray.v1.inference_pb2_grpc as rpc
from moeray.v1 import inference_pb2 as pb
from moeray.vllm_hooks.engine_core import NoShardReady

DOCUMENT = Path(__file__).parents[2] / "docs/grpc.md"
EXAMPLE, GRPC_CHAT, HTTP_CHAT = re.findall(r"```python\n(.*?)```", DOCUMENT.read_text(), re.S)
SAME = "the-same:1"


def refuse_once(ingress: Ingress, monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether it has happened is told by the list's emptiness."""
    left, admit = [True], ingress.server._pool.admit

    def refuse(need: Any) -> Any:
        if left:
            left.pop()
            raise NoShardReady("not yet")
        return admit(need)

    monkeypatch.setattr(ingress.server._pool, "admit", refuse)
    return left


def test_the_example_answers_as_it_is_printed_also_when_it_is_refused_once(
    ingress: Ingress, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert len(EXAMPLE.splitlines()) <= 10
    left = refuse_once(ingress, monkeypatch)
    path = str(Path(rpc.__file__).parents[2])
    done = subprocess.run(
        [sys.executable, "-c", EXAMPLE, ingress.grpc], cwd=tmp_path, env=os.environ | {"PYTHONPATH": path},
        capture_output=True, text=True, timeout=240, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "expert group" in done.stdout and not left


class Broken:
    """A stub whose first stream breaks after three chunks."""

    def __init__(self, stub: rpc.InferenceStub) -> None:
        self._stub, self.breaks = stub, 1

    def ChatStream(self, ask: Any, **call: Any) -> Any:
        stream = self._stub.ChatStream(ask, **call)
        for number, chunk in enumerate(stream):
            if self.breaks and number == 3:
                self.breaks -= 1
                stream.cancel()
            yield chunk


def test_the_documented_ways_to_go_on_after_a_broken_stream_give_the_whole_text_once(ingress: Ingress) -> None:
    body = chat(max_tokens=30, ignore_eos=True)
    whole = ingress.post("/v1/chat/completions", body)[1]["choices"][0]["message"]["content"]
    scope: dict[str, Any] = {"grpc": grpc, "openai": openai, "httpx": httpx}

    exec(GRPC_CHAT, scope)
    with grpc.insecure_channel(ingress.grpc) as channel:
        broken = Broken(rpc.InferenceStub(channel))
        assert "".join(scope["chat"](broken, ParseDict(body, pb.ChatRequest()), timeout=120)) == whole
        assert not broken.breaks

    exec(HTTP_CHAT, scope)
    breaks = [True]

    class Cut(httpx.SyncByteStream):
        def __init__(self, inner: Any) -> None:
            self._inner = inner

        def __iter__(self) -> Any:
            for number, piece in enumerate(self._inner):
                yield piece
                if number == 3 and breaks:
                    breaks.pop()
                    raise httpx.ReadError("cut")

    class Cutting(httpx.HTTPTransport):
        def handle_request(self, request: httpx.Request) -> httpx.Response:
            answer = super().handle_request(request)
            return httpx.Response(answer.status_code, headers=answer.headers, stream=Cut(answer.stream))

    client = openai.OpenAI(
        base_url=f"{ingress.http}/v1", api_key="none", max_retries=5, http_client=httpx.Client(transport=Cutting())
    )
    own = ("chat_template_kwargs", "ignore_eos")
    asked = {key: value for key, value in body.items() if key not in own}
    assert "".join(scope["chat"](client, **asked, extra_body={key: body[key] for key in own})) == whole
    assert not breaks


def test_of_two_requests_with_the_same_name_one_ends_and_the_other_goes_on(
    ingress: Ingress, shared_shard: ShardProcess
) -> None:
    def over_http(**changes: Any) -> Any:
        body = json.dumps(chat(stream=True, ignore_eos=True, **changes)).encode()
        headers = {"content-type": "application/json", "x-request-id": SAME}
        url = f"{ingress.http}/v1/chat/completions"
        return urllib.request.urlopen(urllib.request.Request(url, body, headers), timeout=120)

    def text(answer: Any) -> str:
        events = [line[6:] for line in answer.read().decode().splitlines() if line.startswith("data: {")]
        return "".join(
            choice["delta"].get("content") or "" for event in events for choice in json.loads(event)["choices"]
        )

    expected = text(over_http(max_tokens=300))
    with grpc.insecure_channel(ingress.grpc) as channel:
        message = ParseDict(chat(ignore_eos=True, max_tokens=3000, n=2, temperature=1), pb.ChatRequest())
        ended = rpc.InferenceStub(channel).ChatStream(message, metadata=[("x-request-id", SAME)])
        assert next(ended).id == f"chatcmpl-{SAME}"
        going_on = over_http(max_tokens=300)
        assert going_on.headers["x-request-id"] == SAME
        until(lambda: shared_shard.info().num_requests == 3, 60)

        ended.cancel()

        assert text(going_on) == expected
        until(lambda: shared_shard.info().num_requests == 0, 60)
        assert ingress.server.describe()["admission"]["requests"] == 0
    assert ingress.post("/v1/chat/completions", chat(), headers={"x-request-id": SAME})[1]["model"] == MODEL
