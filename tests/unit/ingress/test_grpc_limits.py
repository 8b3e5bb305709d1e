"""What a client may send over gRPC: each bound has its status."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from vllm.exceptions import VLLMValidationError

from moeray.config import IngressConfig
from moeray.ingress.grpc_server import start_grpc
from moeray.v1 import inference_pb2 as pb
from moeray.v1.inference_pb2_grpc import InferenceStub

LIMITS = IngressConfig(max_body_bytes=4096, max_header_bytes=2048, max_connections=3)
WAIT_S = 60


class Models:
    async def show_available_models(self) -> Any:
        return SimpleNamespace(model_dump=lambda **_: {"data": []})


@pytest.fixture
async def address() -> AsyncIterator[str]:
    openai: Any = SimpleNamespace(models=Models())
    server, port, _ = await start_grpc(openai, "127.0.0.1", 0, limits=LIMITS)
    yield f"127.0.0.1:{port}"
    await server.stop(0)


async def code_of(
    address: str, message: bytes, metadata: tuple[tuple[str, str], ...] = (), **more: Any
) -> grpc.StatusCode:
    async with grpc.aio.insecure_channel(address, **more) as channel:
        method = channel.unary_unary("/moeray.v1.Inference/ListModels")
        try:
            await method(message, metadata=metadata, timeout=WAIT_S)
        except grpc.aio.AioRpcError as error:
            return error.code()
    return grpc.StatusCode.OK


async def test_a_message_beyond_the_bound_is_refused(address: str) -> None:
    assert await code_of(address, b"x" * 4097) is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert await code_of(address, b"") is grpc.StatusCode.OK


async def test_the_messages_of_all_calls_in_hand_have_a_bound_that_is_given_back_however_they_end() -> None:
    gate, waiting = asyncio.Event(), asyncio.Semaphore(0)

    async def create(_: Any) -> Any:
        waiting.release()
        await gate.wait()
        raise VLLMValidationError("over")

    openai: Any = SimpleNamespace(models=Models(), chat=SimpleNamespace(create_chat_completion=create))
    limits = IngressConfig(max_body_bytes=4096, max_bodies_bytes=8192)
    server, port, _ = await start_grpc(openai, "127.0.0.1", 0, limits=limits)
    request = pb.ChatRequest(model="m", messages=[pb.ChatMessage(role="user", content="x" * 3000)])
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        stub = InferenceStub(channel)
        calls = [stub.Chat(request, timeout=WAIT_S) for _ in range(2)]
        for _ in calls:
            await asyncio.wait_for(waiting.acquire(), WAIT_S)
        with pytest.raises(grpc.aio.AioRpcError, match=r"exceed 8192 bytes \(ingress.max_bodies_bytes\)") as refused:
            await stub.Chat(request, timeout=WAIT_S)
        assert refused.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert await stub.ListModels(pb.ListModelsRequest(), timeout=WAIT_S) is not None
        calls[0].cancel()
        async with asyncio.timeout(WAIT_S):
            while True:  # the server hears of it a little later
                third = asyncio.ensure_future(_code(stub.Chat(request, timeout=WAIT_S)))
                heard = asyncio.ensure_future(waiting.acquire())
                await asyncio.wait({third, heard}, return_when=asyncio.FIRST_COMPLETED)
                if heard.done():
                    break
                heard.cancel()
        gate.set()
        assert await third is await _code(calls[1]) is grpc.StatusCode.INVALID_ARGUMENT
        assert await _code(stub.Chat(request, timeout=WAIT_S)) is grpc.StatusCode.INVALID_ARGUMENT
    await server.stop(0)


async def _code(call: Any) -> grpc.StatusCode:
    try:
        await call
    except grpc.aio.AioRpcError as error:
        code: grpc.StatusCode = error.code()
        return code
    return grpc.StatusCode.OK


async def test_a_message_that_would_have_to_be_unpacked_is_refused(address: str) -> None:
    packed = await code_of(address, b"\x00" * 4000, compression=grpc.Compression.Gzip)
    assert packed is grpc.StatusCode.UNIMPLEMENTED


async def test_metadata_beyond_the_bound_is_refused(address: str) -> None:
    assert await code_of(address, b"", (("x-y", "z" * 1000),)) is grpc.StatusCode.OK
    assert await code_of(address, b"", (("x-y", "z" * 4000),)) is grpc.StatusCode.RESOURCE_EXHAUSTED


@pytest.mark.parametrize("method", ["Chat", "ChatStream", "ListModels"])
async def test_bytes_that_are_no_message_are_an_invalid_argument(address: str, method: str) -> None:
    for raw in (b"\xff" * 40, _deep().SerializeToString()):
        if method == "ListModels" and raw != b"\xff" * 40:
            continue  # has no field that could nest
        async with grpc.aio.insecure_channel(address) as channel:
            with pytest.raises(grpc.aio.AioRpcError) as refused:
                async for _ in channel.unary_stream(f"/moeray.v1.Inference/{method}")(raw, timeout=WAIT_S):
                    pass
        assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT


async def test_health_can_be_watched(address: str) -> None:
    async with grpc.aio.insecure_channel(address) as channel:
        watched = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest(), timeout=WAIT_S)
        assert (await watched.read()).status == health_pb2.HealthCheckResponse.NOT_SERVING
        watched.cancel()


def _deep() -> pb.ChatRequest:
    request = pb.ChatRequest()
    value = request.tools.add().function.parameters.fields["a"]
    for _ in range(200):
        value = value.list_value.values.add()
    return request


async def test_connections_are_bounded(address: str) -> None:
    async with contextlib.AsyncExitStack() as stack:
        answered = 0
        for number in range(LIMITS.max_connections + 2):
            options = (("grpc.use_local_subchannel_pool", 1), ("n", number))
            channel = await stack.enter_async_context(grpc.aio.insecure_channel(address, options=options))
            with contextlib.suppress(grpc.aio.AioRpcError):
                await InferenceStub(channel).ListModels(pb.ListModelsRequest(), timeout=WAIT_S)
                answered += 1
        assert answered == LIMITS.max_connections
