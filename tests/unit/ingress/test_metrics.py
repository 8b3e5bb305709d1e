"""What is counted at the doors of an ingress, real servers over handlers that the test writes; and who may read it."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from http import HTTPStatus
from types import SimpleNamespace
from typing import Any

import aiohttp
import grpc
import pytest
from fastapi import FastAPI
from fastapi.responses import StreamingResponse
from prometheus_client.parser import text_string_to_metric_families

from moeray.ingress.arrivals import Arrivals, came_from
from moeray.ingress.grpc_arrivals import GrpcArrivals
from moeray.ingress.grpc_server import SERVICE, start_grpc
from moeray.ingress.http_server import add_probes, start_http
from moeray.ingress.metrics import add_metrics
from moeray.telemetry import RequestMetrics
from moeray.v1 import inference_pb2 as pb
from moeray.v1.inference_pb2_grpc import InferenceStub
from moeray.vllm_hooks.admission import Refused

ASK = pb.ChatRequest(model="m", messages=[pb.ChatMessage(role="user", content="?")])
ENDPOINT = "/v1/chat/completions"


def counted(metrics: RequestMetrics) -> dict[tuple[str, ...], float]:
    """(tenant, endpoint, code) -> requests."""
    return {
        (each.labels["tenant"], each.labels["endpoint"], each.labels["code"]): each.value
        for metric in metrics.registry.collect()
        for each in metric.samples
        if each.name == "moeray_requests_total"
    }


class HttpSite:
    """A server; `who` is the tenant that asks."""

    def __init__(self) -> None:
        self.metrics, self.app = RequestMetrics("m"), FastAPI()
        self.arrivals = Arrivals(self.metrics)
        self.who, self.ends = "", asyncio.Event()
        self.sees: str | None = None

        @self.app.post(ENDPOINT)
        async def chat(how: str = "") -> Any:
            came_from(self.who)
            if how == "breaks":
                raise RuntimeError("a bug")

            async def lines() -> AsyncIterator[str]:
                yield "begun\n"
                await self.ends.wait()

            return StreamingResponse(lines()) if how == "streams" else {}

        pool: Any = SimpleNamespace(is_serving=True, describe=dict)
        add_probes(self.app, pool, self.arrivals, lambda: "")
        add_metrics(self.app, self.metrics.registry, lambda: self.sees)

    async def until(self, expected: dict[tuple[str, ...], float]) -> None:
        async with asyncio.timeout(30):
            while counted(self.metrics) != expected:
                await asyncio.sleep(0.01)


@pytest.fixture
async def site() -> AsyncIterator[tuple[HttpSite, aiohttp.ClientSession]]:
    made = HttpSite()
    listener = socket.create_server(("127.0.0.1", 0))
    port = listener.getsockname()[1]
    server = await start_http(made.app, listener, made.arrivals)
    async with aiohttp.ClientSession(f"http://127.0.0.1:{port}") as session:
        yield made, session
    made.ends.set()
    await server.end(5.0)


Site = tuple[HttpSite, aiohttp.ClientSession]


async def test_requests_are_counted_by_tenant_endpoint_and_code(site: Site) -> None:
    made, session = site
    for who, how in (("a", ""), ("b", ""), ("b", "breaks")):
        made.who = who
        async with session.post(ENDPOINT, params={"how": how}, headers={"connection": "close"}) as answer:
            await answer.read()
    made.arrivals.close()
    async with session.post(ENDPOINT) as answer:
        assert answer.status == HTTPStatus.SERVICE_UNAVAILABLE
    await made.until({
        ("a", ENDPOINT, "200"): 1, ("b", ENDPOINT, "200"): 1, ("b", ENDPOINT, "500"): 1, ("", ENDPOINT, "503"): 1,
    })  # fmt: skip


async def test_a_stream_is_counted_when_it_ends(site: Site) -> None:
    made, session = site
    async with session.post(ENDPOINT, params={"how": "streams"}) as answer:
        assert await answer.content.readline() == b"begun\n"
        assert counted(made.metrics) == {}
        made.ends.set()
        await answer.read()
    await made.until({("", ENDPOINT, "200"): 1})


async def test_paths_that_clients_make_up_and_probes_are_no_labels(site: Site) -> None:
    made, session = site
    for path in ("/health", "/ready", "/../../etc/passwd", "/v1/x1", "/v1/x2", "/v1/batches/b1", "/v1/batches/b2"):
        async with session.get(path) as answer:
            await answer.read()
    await made.until({("", "(other)", "404"): 3, ("", "/v1/batches", "404"): 2})


async def test_a_tenant_sees_no_other_tenants_numbers(site: Site) -> None:
    made, session = site
    for tenant in ("a", "b"):
        made.metrics.charged(tenant, {"prompt": 5})
        made.metrics.quota_refused(tenant, "requests_per_minute")

    async def seen(by: str | None) -> set[str]:
        made.sees = by
        async with session.get("/metrics") as answer:
            text = await answer.text()
        families = list(text_string_to_metric_families(text))
        assert any(family.name == "moeray_ttft_seconds" for family in families)
        return {each.labels["tenant"] for family in families for each in family.samples if "tenant" in each.labels}

    found = {by: await seen(by) - {""} for by in (None, "a", "nobody")}
    assert found == {None: {"a", "b"}, "a": {"a"}, "nobody": set()}


async def asked(create: Callable[..., Awaitable[Any]]) -> dict[tuple[str, ...], float]:
    """What is counted of one gRPC call."""
    metrics = RequestMetrics("m")
    arrivals = Arrivals(metrics)
    openai: Any = SimpleNamespace(chat=SimpleNamespace(create_chat_completion=create), completion=None, models=None)
    server, port, _ = await start_grpc(openai, "127.0.0.1", 0, doors=[GrpcArrivals(SERVICE, arrivals)])
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        call = InferenceStub(channel).ChatStream(ASK, timeout=60)
        try:
            async for _ in call:
                call.cancel()
        except (grpc.aio.AioRpcError, asyncio.CancelledError):
            pass
    async with asyncio.timeout(30):
        while not counted(metrics):
            await asyncio.sleep(0.01)
    await server.stop(None)
    return counted(metrics)


async def test_grpc_calls_are_counted_by_their_status() -> None:
    async def whole(*_: Any) -> Any:
        async def lines() -> AsyncIterator[str]:
            came_from("a")
            yield "data: [DONE]"

        return lines()

    async def refuses(*_: Any) -> Any:
        raise Refused("no", HTTPStatus.TOO_MANY_REQUESTS, retry_after_s=1)

    async def breaks(*_: Any) -> Any:
        raise RuntimeError("a bug")

    async def endless(*_: Any) -> Any:
        async def lines() -> AsyncIterator[str]:
            yield 'data: {"id": "c", "choices": []}'
            await asyncio.get_running_loop().create_future()

        return lines()

    assert await asked(whole) == {("a", "ChatStream", "OK"): 1}
    assert await asked(refuses) == {("", "ChatStream", "RESOURCE_EXHAUSTED"): 1}
    assert await asked(endless) == {("", "ChatStream", "CANCELLED"): 1}
    (broken,) = await asked(breaks)
    assert broken[:2] == ("", "ChatStream") and broken[2] in ("INTERNAL", "UNKNOWN")
