"""Images pass through to a model that takes them, over both protocols, and go along when a request moves."""

from __future__ import annotations

import base64
import io
import json
import os
import signal
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from front_process import Ingress, ShardProcess, chat, until
from google.protobuf.json_format import ParseDict
from PIL import Image
from small_models import write_blip2

from moeray.v1 import inference_pb2 as pb
from moeray.v1.inference_pb2_grpc import InferenceStub
from moeray.vllm_hooks.served_model import ExpertsIn

pytestmark = pytest.mark.full
CHAT = "/v1/chat/completions"


@pytest.fixture(scope="module")
def blip2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_blip2(tmp_path_factory.mktemp("blip2"))


def start(name: str, model: Path) -> ShardProcess:
    shard = ShardProcess(name, model, is_whole=True, max_model_len=1024)
    event = shard.wait_ready()
    assert event.event == "ready", event.text
    return shard


@pytest.fixture(scope="module")
def shards(blip2: Path) -> Iterator[list[ShardProcess]]:
    started = [start("sees 0", blip2), start("sees 1", blip2)]
    yield started
    for shard in started:
        shard.stop()


@pytest.fixture(scope="module")
def sees(blip2: Path, shards: list[ShardProcess]) -> Iterator[Ingress]:
    ingress = Ingress(blip2, front={"experts_in": ExpertsIn.VLLM, "engine_args": {"max_model_len": 1024}})
    ingress.set_shards(*shards)
    yield ingress
    ingress.stop()


def data_url(colour: str) -> str:
    buffer = io.BytesIO()
    Image.new("RGB", (28, 28), colour).save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def ask(url: str, **changes: Any) -> dict[str, Any]:
    parts = [{"type": "text", "text": "What is this? "}, {"type": "image_url", "image_url": {"url": url}}]
    fields = {"max_tokens": 24, "ignore_eos": True, "logprobs": True, "seed": 1} | changes
    return {**chat(messages=[{"role": "user", "content": parts}]), **fields}


def logprobs(ingress: Ingress, url: str) -> list[tuple[str, float]]:
    status, answer, _ = ingress.post(CHAT, ask(url))
    assert status == 200, answer
    return [(each["token"], each["logprob"]) for each in answer["choices"][0]["logprobs"]["content"]]


def test_an_image_is_seen_and_equal_images_give_equal_answers_on_every_shard(sees: Ingress) -> None:
    red = [logprobs(sees, data_url("red")) for _ in range(4)]
    assert all(each == red[0] for each in red), "the requests were spread over both shards"
    assert logprobs(sees, data_url("blue")) != red[0]


def test_grpc_takes_the_same_parts_and_gives_the_same_answer(sees: Ingress) -> None:
    body = ask(data_url("green"))
    status, answer, _ = sees.post(CHAT, body)
    assert status == 200, answer
    message = body["messages"][0]
    body = {**body, "messages": [{"role": "user", "content_parts": message["content"]}]}
    body.pop("chat_template_kwargs")
    with grpc.insecure_channel(sees.grpc) as channel:
        got = InferenceStub(channel).Chat(ParseDict(body, pb.ChatRequest()), timeout=120)
    assert got.choices[0].message.content == answer["choices"][0]["message"]["content"]


@pytest.mark.parametrize("url", ["http://127.0.0.1:9/a.png", "https://169.254.169.254/x", "file:///etc/hostname"])
def test_what_would_have_to_be_fetched_is_refused(sees: Ingress, url: str) -> None:
    status, answer, _ = sees.post(CHAT, ask(url))
    assert (status, answer["error"]["param"]) == (400, "messages"), answer


def test_what_is_no_image_is_the_clients_error(sees: Ingress) -> None:
    for url in ("data:image/png;base64,AAAA", "data:image/png;base64,%%%", "data:,", "data:image/svg+xml,<svg/>"):
        status, answer, _ = sees.post(CHAT, ask(url))
        assert status == (400 if "base64" in url else 501), (url, answer)


def test_a_request_with_an_image_goes_on_with_the_same_text_when_its_shard_is_killed(
    sees: Ingress, shards: list[ShardProcess], blip2: Path
) -> None:
    body = ask(data_url("red"), max_tokens=600, stream=False, logprobs=False)
    whole = sees.post(CHAT, body, timeout_s=120)[1]["choices"][0]["message"]["content"]
    request = urllib.request.Request(
        sees.http + CHAT, json.dumps(body | {"stream": True}).encode(), {"content-type": "application/json"}
    )
    text = ""
    with urllib.request.urlopen(request, timeout=120) as answer:
        for line in answer:
            if not line.startswith(b"data: {"):
                continue
            text += json.loads(line[6:])["choices"][0]["delta"].get("content") or ""
            if len(text) > 20 and not (killed := [s for s in shards if s.process.poll() is not None]):
                described = sees.server.describe()["shards"]
                (runs,) = [shard for shard in shards if described[shard.spec.shard]["requests"]]
                for pid in (runs.up.engine_pid, runs.process.pid):
                    os.kill(pid, signal.SIGKILL)
                runs.process.wait(60)
                killed = [runs]
    assert killed and text == whole
    until(lambda: sees.server.num_requests == 0, 60)
