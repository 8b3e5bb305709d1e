"""A real gRPC server over handlers that the test writes: pings, ids, limits, and what its errors tell a client."""

from __future__ import annotations

import asyncio
import json
import struct
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from http import HTTPStatus
from types import SimpleNamespace
from typing import Any

import grpc
import pytest
from google.protobuf.duration_pb2 import Duration
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from moeray.config import IngressConfig
from moeray.ingress import grpc_server
from moeray.ingress.arrivals import Arrivals
from moeray.ingress.grpc_arrivals import GrpcArrivals
from moeray.ingress.grpc_server import SERVICE, start_grpc
from moeray.ingress.tenants.refusals import refused
from moeray.tenancy import QuotaExceeded
from moeray.v1 import inference_pb2 as pb
from moeray.v1.inference_pb2_grpc import InferenceStub
from moeray.vllm_hooks.admission import Refused

ASK = pb.ChatRequest(model="m", messages=[pb.ChatMessage(role="user", content="?")])
RETRIES = {
    "methodConfig": [
        {
            "name": [{"service": SERVICE}],
            "retryPolicy": {
                "maxAttempts": 3, "initialBackoff": "0.05s", "maxBackoff": "0.1s", "backoffMultiplier": 2,
                "retryableStatusCodes": ["UNAVAILABLE"],
            },
        }
    ]
}  # fmt: skip
OVER = Refused("not now", HTTPStatus.SERVICE_UNAVAILABLE, retry_after_s=0)


@asynccontextmanager
async def serving(create: Callable[..., Awaitable[Any]], **more: Any) -> AsyncIterator[tuple[int, Arrivals]]:
    arrivals = Arrivals()
    chat = SimpleNamespace(create_chat_completion=create)
    openai: Any = SimpleNamespace(chat=chat, completion=None, models=None)
    doors = [GrpcArrivals(SERVICE, arrivals)]
    server, port, _ = await start_grpc(openai, "127.0.0.1", 0, doors=doors, **more)
    try:
        yield port, arrivals
    finally:
        await server.stop(None)


def channel(port: int, **options: Any) -> grpc.aio.Channel:
    return grpc.aio.insecure_channel(f"127.0.0.1:{port}", options=tuple(options.items()))


async def chunks(*, endless: bool = False) -> AsyncIterator[str]:
    yield "data: " + json.dumps({"id": "c", "choices": []})
    if endless:
        await asyncio.get_running_loop().create_future()
    yield "data: [DONE]"


async def error_of(port: int, **metadata: str) -> grpc.aio.AioRpcError:
    async with channel(port) as opened:
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            await InferenceStub(opened).Chat(ASK, metadata=[*metadata.items()], timeout=60)
    error = raised.value
    assert isinstance(error, grpc.aio.AioRpcError)
    return error


def details_of(error: grpc.aio.AioRpcError) -> list[Any]:
    rich = rpc_status.from_call(error)
    assert rich is not None
    return list(rich.details)


async def test_every_answer_carries_the_name_that_its_client_gave() -> None:
    names: list[str | None] = []

    async def create(request: Any, _: Any = None) -> Any:
        names.append(request.request_id)
        return chunks()

    async with serving(create) as (port, _), channel(port) as opened:
        for metadata in ((), (("x-request-id", "mine:1"),)):
            call = InferenceStub(opened).ChatStream(ASK, metadata=metadata, timeout=60)
            assert [chunk.id async for chunk in call] == ["c"]
            trailing = dict(await call.trailing_metadata())
            assert trailing["x-request-id"] == "mine:1" if metadata else len(trailing["x-request-id"]) == 32
        assert names[1] == "mine:1"


@pytest.mark.parametrize("name", ["", "x" * 129, "a b", "<script>"])
async def test_a_name_that_is_too_long_or_not_plain_is_refused(name: str) -> None:
    async def create(request: Any, _: Any = None) -> Any:
        raise AssertionError("it got through")

    async with serving(create) as (port, _):
        error = await error_of(port, **{"x-request-id": name})
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
    field = error_details_pb2.BadRequest()
    assert details_of(error)[0].Unpack(field) and field.field_violations[0].field == "x-request-id"


async def test_a_limit_of_the_tenant_is_named_and_when_to_come_back() -> None:
    async def create(request: Any, _: Any = None) -> Any:
        exceeded = QuotaExceeded("requests_per_minute", 6.5, {"requests_per_minute": 0}, {"requests_per_minute": 6.5})
        raise refused(exceeded) from exceeded

    async with serving(create) as (port, _):
        error = await error_of(port, **{"x-request-id": "mine"})
    assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    retry, quota, named = (
        error_details_pb2.RetryInfo(), error_details_pb2.QuotaFailure(), error_details_pb2.RequestInfo(),
    )  # fmt: skip
    for packed, detail in zip(details_of(error), (retry, quota, named), strict=True):
        assert packed.Unpack(detail)
    assert retry.retry_delay == Duration(seconds=7)
    assert quota.violations[0].subject == "requests_per_minute"
    assert named.request_id == "mine"
    trailing = dict(error.trailing_metadata())
    assert (trailing["grpc-retry-pushback-ms"], trailing["x-request-id"]) == ("7000", "mine")


async def test_a_limit_that_no_waiting_helps_says_so() -> None:
    async def create(request: Any, _: Any = None) -> Any:
        exceeded = QuotaExceeded("tokens_per_minute", None, {}, {})
        raise refused(exceeded) from exceeded

    async with serving(create) as (port, _):
        error = await error_of(port)
    assert not any(detail.Is(error_details_pb2.RetryInfo.DESCRIPTOR) for detail in details_of(error))
    assert dict(error.trailing_metadata())["grpc-retry-pushback-ms"] == "-1"


async def test_a_client_with_a_retry_policy_notices_nothing_of_one_refusal() -> None:
    answers = [OVER]

    async def create(request: Any, _: Any = None) -> Any:
        if answers:
            raise answers.pop()
        return chunks()

    async with (
        serving(create) as (port, _),
        channel(port, **{"grpc.service_config": json.dumps(RETRIES)}) as opened,
    ):
        call = InferenceStub(opened).ChatStream(ASK, timeout=60)
        assert [chunk.id async for chunk in call] == ["c"]


async def test_a_message_above_the_limit_is_refused_with_both_numbers() -> None:
    async def create(request: Any, _: Any = None) -> Any:
        raise AssertionError("it got through")

    big = pb.ChatRequest(messages=[pb.ChatMessage(content="x" * IngressConfig().max_body_bytes)])
    async with serving(create) as (port, _), channel(port) as opened:
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            await InferenceStub(opened).Chat(big, timeout=60)
    assert raised.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert str(IngressConfig().max_body_bytes) in str(raised.value.details()) and "larger than max" in str(
        raised.value.details()
    )
    assert rpc_status.from_call(raised.value) is None, "no RetryInfo: it will never pass"


# ---- keepalive

PING, GOAWAY, SETTINGS, ACK = 0x6, 0x7, 0x4, 0x1
ENHANCE_YOUR_CALM = 0xB


def frame(kind: int, payload: bytes = b"", flags: int = 0) -> bytes:
    return struct.pack(">I", len(payload))[1:] + bytes([kind, flags]) + bytes(4) + payload


async def until_frame(reader: asyncio.StreamReader, *kinds: int) -> tuple[int, bytes]:
    """The next frame of one of these kinds; a PING only if it answers ours."""
    async with asyncio.timeout(60):
        while True:
            head = await reader.readexactly(9)
            payload = await reader.readexactly(int.from_bytes(head[:3], "big"))
            if head[3] in kinds and (head[3] != PING or head[4] & ACK):
                return head[3], payload


async def test_clients_may_ping_as_often_as_is_promised_and_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grpc_server, "MIN_CLIENT_PING_S", 0.2)

    async def create(request: Any, _: Any = None) -> Any: ...

    async with serving(create) as (port, _):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + frame(SETTINGS))
        for number in range(6):
            writer.write(frame(PING, struct.pack(">Q", number)))
            assert await until_frame(reader, PING, GOAWAY) == (PING, struct.pack(">Q", number))
            await asyncio.sleep(0.25)
        writer.write(frame(PING, bytes(8)) * 10)
        _, why = await until_frame(reader, GOAWAY)
        assert int.from_bytes(why[4:8], "big") == ENHANCE_YOUR_CALM
        writer.close()


async def test_a_client_that_gives_no_sign_of_life_loses_its_request() -> None:
    """As behind a cut cable: its connection stays, and nothing comes or goes."""
    ended = asyncio.Event()
    is_cut = False

    async def create(request: Any, _: Any = None) -> Any:
        async def stream() -> AsyncIterator[str]:
            try:
                async for chunk in chunks(endless=True):
                    yield chunk
            finally:
                ended.set()

        return stream()

    async def forward(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(1 << 16):
            if not is_cut:
                writer.write(data)

    async with serving(create, keepalive_s=0.6) as (port, arrivals):

        async def cable(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            there, back = await asyncio.open_connection("127.0.0.1", port)
            await asyncio.gather(forward(reader, back), forward(there, writer), return_exceptions=True)

        proxy = await asyncio.start_server(cable, "127.0.0.1", 0)
        async with channel(proxy.sockets[0].getsockname()[1]) as opened:
            call = InferenceStub(opened).ChatStream(ASK)
            assert (await call.read()).id == "c"
            await asyncio.sleep(2)
            assert not ended.is_set() and arrivals.num_in_hand == 1, "it answers: it stays"

            is_cut = True

            await asyncio.wait_for(ended.wait(), 60)
            assert await arrivals.all_answered(60)
            call.cancel()
        proxy.close()
