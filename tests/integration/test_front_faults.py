"""A shard that dies, drains or never starts: what clients are told, and what stays alive."""

from __future__ import annotations

import json
import os
import shutil
import signal
import threading
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import psutil
import pytest
from front_process import Ingress, ShardProcess, chat, until
from google.protobuf.json_format import ParseDict
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from moeray.v1 import inference_pb2 as pb
from moeray.v1.inference_pb2_grpc import InferenceStub

LONG = chat(max_tokens=3000, ignore_eos=True, stream=True)


@pytest.fixture(scope="module")
def victims(model: Path) -> Iterator[list[ShardProcess]]:
    """Three shards to lose, started together."""
    shards = [ShardProcess(name, model) for name in ("v0", "v1", "v2")]
    for shard in shards:
        assert shard.wait_ready().event == "ready"
        shard.connect(model)
    yield shards
    for shard in shards:
        shard.stop()


class Stream(threading.Thread):
    """One HTTP stream, read to its end."""

    def __init__(self, ingress: Ingress, body: dict[str, Any]) -> None:
        super().__init__(daemon=True)
        self.events: list[dict[str, Any]] = []
        self._request = urllib.request.Request(
            f"{ingress.http}/v1/chat/completions", json.dumps(body).encode(), {"content-type": "application/json"}
        )
        self.start()

    def run(self) -> None:
        with urllib.request.urlopen(self._request, timeout=60) as answer:
            self.events.extend(json.loads(line[6:]) for line in answer if line.startswith(b"data: {"))

    def end(self) -> dict[str, Any]:
        self.join(60)
        assert not self.is_alive()
        return self.events[-1]


def test_a_killed_engine_ends_its_own_streams_with_the_reason_and_no_other(
    ingress: Ingress, shared_shard: ShardProcess, victims: list[ShardProcess]
) -> None:
    victim = victims[0]
    ingress.set_shards(shared_shard, victim)
    streams = [Stream(ingress, chat(max_tokens=300, ignore_eos=True, stream=True)) for _ in range(2)]
    until(lambda: shared_shard.info().num_running == 1 and victim.info().num_running == 1)
    engine_pid = victim.info().engine_pid

    os.kill(engine_pid, signal.SIGKILL)

    ends = [stream.end() for stream in streams]
    (error,) = [event["error"] for event in ends if "error" in event]
    assert error["code"] == 503 and "attention shard v0 lost" in error["message"] and "SIGKILL" in error["message"]
    assert [event["choices"][0]["finish_reason"] for event in ends if "error" not in event] == ["length"]
    assert victim.process.wait(10) == 3
    lost = victim.event()
    assert lost is not None and lost.event == "lost" and "SIGKILL" in lost.text


def test_a_killed_shard_process_takes_its_engine_with_it_and_clients_get_unavailable(
    ingress: Ingress, shared_shard: ShardProcess, victims: list[ShardProcess]
) -> None:
    victim = victims[1]
    ingress.set_shards(victim)
    engine = psutil.Process(victim.info().engine_pid)
    stream = Stream(ingress, LONG)
    until(lambda: victim.info().num_running == 1)

    victim.process.kill()

    assert "attention shard v1 lost" in stream.end()["error"]["message"]
    until(lambda: not engine.is_running() or engine.status() == psutil.STATUS_ZOMBIE)
    started = time.monotonic()
    status, answer, headers = ingress.post("/v1/chat/completions", chat())
    assert (status, "v1" in answer["error"]["message"], headers["retry-after"]) == (503, True, "1")
    assert ingress.post("/v1/chat/completions", chat(stream=True))[0] == 503
    with grpc.insecure_channel(ingress.grpc) as channel, pytest.raises(grpc.RpcError) as refused:
        InferenceStub(channel).Chat(ParseDict(chat(), pb.ChatRequest()), timeout=10)
    assert time.monotonic() - started < 3
    assert refused.value.code() is grpc.StatusCode.UNAVAILABLE
    retry = error_details_pb2.RetryInfo()
    rich = rpc_status.from_call(refused.value)
    assert rich is not None and rich.details[0].Unpack(retry) and retry.retry_delay.seconds == 1
    status, health, _ = ingress.get("/health")
    assert status == 503 and health["shards"]["v1"]["state"] == "connecting"

    ingress.set_shards(shared_shard)
    assert ingress.get("/health")[0] == 200
    assert ingress.post("/v1/chat/completions", chat())[0] == 200


def test_sigterm_lets_streams_end_and_sends_new_ones_elsewhere(
    ingress: Ingress, shared_shard: ShardProcess, victims: list[ShardProcess]
) -> None:
    victim = victims[2]
    ingress.set_shards(victim)
    stream = Stream(ingress, chat(max_tokens=200, ignore_eos=True, stream=True))
    until(lambda: victim.info().num_running == 1)
    ingress.set_shards(victim, shared_shard)

    victim.process.terminate()

    until(lambda: ingress.server.describe()["shards"]["v2"]["state"] != "ready")
    assert ingress.post("/v1/chat/completions", chat())[0] == 200
    assert stream.end()["choices"][0]["finish_reason"] == "length"
    assert victim.process.wait(60) == 0
    ingress.set_shards(shared_shard)


def test_held_requests_are_refused_with_the_reason_of_the_cluster(ingress: Ingress, shared_shard: ShardProcess) -> None:
    ingress.server.hold("generation 2 misses an expert group")
    try:
        status, answer, _ = ingress.post("/v1/chat/completions", chat())
        assert (status, answer["error"]["message"]) == (503, "generation 2 misses an expert group")
        assert ingress.get("/health")[0] == 503
    finally:
        ingress.server.hold("")
    assert ingress.post("/v1/chat/completions", chat())[0] == 200


def test_a_checkpoint_that_cannot_be_loaded_is_the_reason_of_the_failure(model: Path, tmp_path: Path) -> None:
    damaged = tmp_path / "damaged"
    shutil.copytree(model, damaged)
    file = damaged / "model.safetensors"
    os.truncate(file, file.stat().st_size - 4096)

    shard = ShardProcess("broken", damaged)

    event = shard.wait_ready()
    assert event.event == "failed" and "model.safetensors" in event.text
    assert shard.process.wait(20) == 2
