"""A shard that dies, hangs, drains or never starts: clients notice nothing, or are told what happened."""

from __future__ import annotations

import os
import shutil
import signal
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import psutil
import pytest
from answers import CHAT, Answer, Asked
from front_process import Ingress, ShardProcess, chat, until
from google.protobuf.json_format import ParseDict
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from moeray.attention_shard.link import KEEPALIVE_S
from moeray.ingress.shard_pool import WAIT_S
from moeray.v1 import inference_pb2 as pb
from moeray.v1.inference_pb2_grpc import InferenceStub

SAME_LOGPROB = 0.1
QUESTIONS = ("What is an expert group?", "What is moeray?", "What is DSML?", "Explain the --http flag.")


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


def long(question: str = QUESTIONS[0], **changes: Any) -> dict[str, Any]:
    """An answer that goes on for long after what the model was taught to say."""
    ask = {"messages": [{"role": "user", "content": question}], "max_tokens": 150, "ignore_eos": True, "logprobs": True}
    return chat(**ask, **changes)


def run_on(ingress: Ingress, shard: ShardProcess, *bodies: dict[str, Any], num_tokens: int = 20) -> list[Asked]:
    """Streams that run on this shard and have had so many tokens."""
    ingress.set_shards(shard)
    streams = [Asked(ingress, CHAT, body, stream=True) for body in bodies]
    pool = ingress.server._pool
    until(lambda: sum(len(known.token_ids) >= num_tokens for known in [*pool.in_flight.values()]) >= len(bodies), 60)
    return streams


def fault_free(ingress: Ingress, shard: ShardProcess, *bodies: dict[str, Any]) -> list[Answer]:
    ingress.set_shards(shard)
    return [stream.end() for stream in [Asked(ingress, CHAT, body, stream=True) for body in bodies]]


def test_a_killed_engine_moves_its_streams_and_no_client_notices(
    ingress: Ingress, shared_shard: ShardProcess, victims: list[ShardProcess]
) -> None:
    victim = victims[0]
    bodies = [long(question) for question in QUESTIONS] + [long(temperature=0.9, seed=5), long(frequency_penalty=1.0)]
    expected = fault_free(ingress, shared_shard, *bodies)
    streams = run_on(ingress, victim, *bodies)
    ingress.set_shards(victim, shared_shard)

    os.kill(victim.info().engine_pid, signal.SIGKILL)

    for stream, known in zip(streams, expected, strict=True):
        stream.end().assert_same(known, SAME_LOGPROB)
    gaps = sorted(max(stream.answer.gaps_s) for stream in streams)
    print(f"longest gap of each stream: {[round(gap, 3) for gap in gaps]}, median {statistics.median(gaps):.3f} s")
    assert victim.process.wait(20) == 3
    lost = victim.event()
    assert lost is not None and lost.event == "lost" and "SIGKILL" in lost.text


def test_a_shard_that_stands_still_is_left_within_its_keepalive_and_used_again_when_it_moves(
    ingress: Ingress, shared_shard: ShardProcess, victims: list[ShardProcess]
) -> None:
    victim = victims[1]
    (expected,) = fault_free(ingress, shared_shard, long())
    (stream,) = run_on(ingress, victim, long())
    ingress.set_shards(victim, shared_shard)
    processes = [psutil.Process(pid) for pid in (victim.process.pid, victim.info().engine_pid)]
    for process in processes:
        process.suspend()
    try:
        stream.end().assert_same(expected, SAME_LOGPROB)
    finally:
        for process in processes:
            process.resume()
    print(f"longest gap {max(stream.answer.gaps_s):.3f} s; keepalive {KEEPALIVE_S} s")
    until(lambda: len(ingress.server._pool.ready_shards) == 2, 60)
    until(lambda: victim.info().num_requests == 0, 60)  # what it had is not computed to its end
    (again,) = run_on(ingress, victim, long())
    again.end().assert_same(expected, SAME_LOGPROB)


def test_a_killed_shard_process_takes_its_engine_with_it_and_its_stream_waits_for_another(
    ingress: Ingress, shared_shard: ShardProcess, victims: list[ShardProcess]
) -> None:
    victim = victims[1]
    (expected,) = fault_free(ingress, shared_shard, long())
    (stream,) = run_on(ingress, victim, long())
    engine = psutil.Process(victim.info().engine_pid)

    victim.process.kill()

    until(lambda: not engine.is_running() or engine.status() == psutil.STATUS_ZOMBIE)
    pool = ingress.server._pool
    until(lambda: not pool.ready_shards)
    new = Asked(ingress, CHAT, chat(), stream=True)
    until(lambda: pool.num_waiting == 2)
    pool._last_ready -= WAIT_S  # a minute later
    status, answer, headers = ingress.post("/v1/chat/completions", chat())
    assert (status, "v1" in answer["error"]["message"], headers["retry-after"]) == (503, True, "1")
    assert ingress.post("/v1/chat/completions", chat(stream=True))[0] == 503
    with grpc.insecure_channel(ingress.grpc) as channel, pytest.raises(grpc.RpcError) as refused:
        InferenceStub(channel).Chat(ParseDict(chat(), pb.ChatRequest()), timeout=10)
    assert refused.value.code() is grpc.StatusCode.UNAVAILABLE
    retry = error_details_pb2.RetryInfo()
    rich = rpc_status.from_call(refused.value)
    assert rich is not None and rich.details[0].Unpack(retry) and retry.retry_delay.seconds == 1
    status, ready, _ = ingress.get("/ready")
    assert status == 503 and ready["shards"]["v1"]["state"] == "connecting"
    assert ingress.get("/health")[0] == 200, "a restart of the ingress would not help"
    assert stream.is_alive() and stream.answer.error is None, "an accepted request waits"
    assert new.is_alive() and new.answer.error is None, "and so does a new one"

    ingress.set_shards(shared_shard)

    stream.end().assert_same(expected, SAME_LOGPROB)
    assert new.end().choices[0].text
    assert ingress.get("/ready")[0] == 200
    assert ingress.post("/v1/chat/completions", chat())[0] == 200


def test_sigterm_lets_streams_end_and_then_hands_over_what_is_left(
    ingress: Ingress, shared_shard: ShardProcess, victims: list[ShardProcess]
) -> None:
    victim = victims[2]
    lasting = long() | {"max_tokens": 400}
    (expected,) = fault_free(ingress, shared_shard, lasting)
    short, stream = run_on(ingress, victim, long(), lasting)
    ingress.set_shards(victim, shared_shard)
    before = ingress.server._pool.continued

    victim.process.terminate()

    until(lambda: ingress.server.describe()["shards"]["v2"]["state"] != "ready")
    assert ingress.post("/v1/chat/completions", chat())[0] == 200
    assert short.end().choices[0].finish == "length"
    assert ingress.server._pool.continued == before
    victim.process.terminate()  # as if its time were over
    assert victim.process.wait(60) == 0
    stream.end().assert_same(expected, SAME_LOGPROB)
    assert ingress.server._pool.continued == before + 1
    ingress.set_shards(shared_shard)


def test_held_requests_are_refused_with_the_reason_of_the_cluster(ingress: Ingress, shared_shard: ShardProcess) -> None:
    ingress.server.hold("generation 2 misses an expert group")
    try:
        status, answer, _ = ingress.post("/v1/chat/completions", chat())
        assert (status, answer["error"]["message"]) == (503, "generation 2 misses an expert group")
        assert ingress.get("/ready")[0] == 503
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
