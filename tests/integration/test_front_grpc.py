"""moeray.v1.Inference over a real engine: the same answers as HTTP, deadlines and cancellation, health, reflection."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import grpc
import pytest
from front_process import MODEL, Ingress, ShardProcess, chat, until
from google.protobuf.json_format import ParseDict
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from moeray.v1 import inference_pb2 as pb
from moeray.v1.inference_pb2_grpc import InferenceStub


@pytest.fixture(scope="module")
def channel(ingress: Ingress) -> Iterator[grpc.Channel]:
    with grpc.insecure_channel(ingress.grpc) as channel:
        yield channel


@pytest.fixture(scope="module")
def stub(channel: grpc.Channel) -> InferenceStub:
    return InferenceStub(channel)


def request(**changes: Any) -> pb.ChatRequest:
    return ParseDict(chat(**changes), pb.ChatRequest())


def test_chat_answers_what_http_answers(stub: InferenceStub, ingress: Ingress) -> None:
    over_http = ingress.post("/v1/chat/completions", chat(ignore_eos=True))[1]
    over_grpc = stub.Chat(request(ignore_eos=True), timeout=60)

    assert over_grpc.choices[0].message.content == over_http["choices"][0]["message"]["content"]
    assert over_grpc.choices[0].finish_reason == over_http["choices"][0]["finish_reason"]
    usage = over_http["usage"]
    assert (over_grpc.usage.prompt_tokens, over_grpc.usage.completion_tokens) == (
        usage["prompt_tokens"],
        usage["completion_tokens"],
    )


def test_the_stream_is_the_answer_in_pieces(stub: InferenceStub) -> None:
    whole = stub.Chat(request(ignore_eos=True), timeout=60)
    chunks = list(stub.ChatStream(request(ignore_eos=True, stream_options={"include_usage": True}), timeout=60))

    text = "".join(choice.delta.content for chunk in chunks for choice in chunk.choices)
    assert text == whole.choices[0].message.content
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens == 8
    assert len(chunks) >= 8


def test_completions_answer_what_http_answers(stub: InferenceStub, ingress: Ingress) -> None:
    ask = {"model": MODEL, "prompt": "moeray is", "max_tokens": 6, "temperature": 0, "logprobs": 2, "ignore_eos": True}
    over_http = ingress.post("/v1/completions", ask)[1]["choices"][0]
    over_grpc = stub.Complete(ParseDict(ask | {"prompt": ["moeray is"]}, pb.CompletionRequest()), timeout=60).choices[0]
    streamed = list(stub.CompleteStream(ParseDict(ask | {"prompt": ["moeray is"]}, pb.CompletionRequest()), timeout=60))

    assert over_grpc.text == over_http["text"] == "".join(choice.text for chunk in streamed for choice in chunk.choices)
    assert list(over_grpc.logprobs.tokens) == over_http["logprobs"]["tokens"]
    assert [v.number_value for v in over_grpc.logprobs.token_logprobs] == pytest.approx(
        over_http["logprobs"]["token_logprobs"]
    )


def test_token_logprobs_carry_bytes_and_alternatives(stub: InferenceStub) -> None:
    answer = stub.Chat(request(logprobs=True, top_logprobs=2, ignore_eos=True), timeout=60)

    tokens = answer.choices[0].logprobs.content
    assert len(tokens) == 8
    for token in tokens:
        assert len(token.top_logprobs) >= 2 and token.logprob <= 0
        assert token.bytes == token.token.encode() or "\ufffd" in token.token


def test_an_expired_deadline_stops_the_request_in_the_engine(stub: InferenceStub, shared_shard: ShardProcess) -> None:
    for call in (stub.Chat, lambda ask, timeout: list(stub.ChatStream(ask, timeout=timeout))):
        with pytest.raises(grpc.RpcError) as expired:
            call(request(max_tokens=3000, ignore_eos=True), timeout=0.7)
        assert expired.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        until(lambda: shared_shard.info().num_running == 0 and shared_shard.info().num_requests == 0)


def test_a_cancelled_stream_stops_in_the_engine(stub: InferenceStub, shared_shard: ShardProcess) -> None:
    stream = stub.ChatStream(request(max_tokens=3000, ignore_eos=True), timeout=60)
    for _ in range(3):
        next(stream)
    assert shared_shard.info().num_running == 1

    stream.cancel()

    until(lambda: shared_shard.info().num_running == 0 and shared_shard.info().num_requests == 0)


def test_models_health_and_reflection_answer(channel: grpc.Channel, stub: InferenceStub) -> None:
    (model,) = stub.ListModels(pb.ListModelsRequest(), timeout=10).data
    assert model.id == MODEL and model.max_model_len > 0
    health = health_pb2_grpc.HealthStub(channel)
    for service in ("", "moeray.v1.Inference"):
        answer = health.Check(health_pb2.HealthCheckRequest(service=service), timeout=10)
        assert answer.status == health_pb2.HealthCheckResponse.SERVING
    ask = iter([reflection_pb2.ServerReflectionRequest(list_services="")])
    listed = next(reflection_pb2_grpc.ServerReflectionStub(channel).ServerReflectionInfo(ask))
    assert {service.name for service in listed.list_services_response.service} >= {
        "moeray.v1.Inference",
        "grpc.health.v1.Health",
    }
