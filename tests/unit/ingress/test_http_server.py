"""A real HTTP server over an application that the test writes: probes, names of requests, and how it stops."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
from fastapi import FastAPI, Request
from fastapi.responses import StreamingResponse

from moeray.ingress import stopping
from moeray.ingress.arrivals import Arrivals
from moeray.ingress.http_server import HttpServer, add_probes, start_http
from moeray.ingress.stopping import drain


@dataclass
class Pool:
    """What the door needs of a shard pool."""

    is_serving: bool = True
    is_closed: bool = False
    ends: asyncio.Event = field(default_factory=asyncio.Event)

    def describe(self) -> dict[str, Any]:
        return {}

    async def close(self) -> None:
        self.is_closed = True
        self.ends.set()


@dataclass
class Door:
    """The server under test. `/wait` answers, streamed, when the pool ends."""

    http: HttpServer
    port: int
    arrivals: Arrivals
    pool: Pool
    why_dead: str = ""
    stopped: asyncio.Task[None] | None = None

    def stop(self, drain_s: float = 60.0) -> asyncio.Task[None]:
        pool: Any = self.pool
        if self.stopped is None:
            self.stopped = asyncio.create_task(
                drain(self.arrivals, pool, drain_s, http=self.http, grpc_server=None, health=None)
            )
        return self.stopped


@pytest.fixture
async def door() -> AsyncIterator[Door]:
    app, pool, arrivals = FastAPI(), Pool(), Arrivals()
    found: list[Door] = []

    @app.get("/echo")
    async def echo(request: Request) -> dict[str, str | None]:
        return {"id": request.headers.get("x-request-id")}

    @app.get("/wait")
    async def wait() -> StreamingResponse:
        async def lines() -> AsyncIterator[str]:
            yield "begun\n"
            await pool.ends.wait()
            yield "ended\n"

        return StreamingResponse(lines())

    add_probes(app, pool, arrivals, lambda: found[0].why_dead)  # type: ignore[arg-type]
    listener = socket.create_server(("127.0.0.1", 0))
    http = await start_http(app, listener, arrivals, door=_closed)
    found.append(Door(http, listener.getsockname()[1], arrivals, pool))
    yield found[0]
    pool.ends.set()
    await found[0].stop(0.0)


def _closed(app: Any) -> Any:
    """As of tenants: nobody has a credential for `/secret`."""

    async def guarded(scope: Any, receive: Any, send: Any) -> None:
        assert scope["type"] == "lifespan" or scope["path"] in ("/echo", "/wait"), scope["path"]
        await app(scope, receive, send)

    return guarded


@dataclass
class Client:
    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter

    async def ask(self, path: str, **headers: str) -> tuple[int, dict[str, str]]:
        lines = [f"GET {path} HTTP/1.1", "host: x", *(f"{name}: {value}" for name, value in headers.items()), "", ""]
        self.writer.write("\r\n".join(lines).encode())
        async with asyncio.timeout(60):
            status = int((await self.reader.readline()).split()[1])
            found = {}
            while line := (await self.reader.readline()).decode().strip():
                name, _, value = line.partition(":")
                found[name.lower()] = value.strip()
        return status, found

    async def body(self, headers: dict[str, str]) -> Any:
        return json.loads(await self.reader.readexactly(int(headers["content-length"])))

    async def is_closed(self) -> bool:
        async with asyncio.timeout(60):
            return await self.reader.read(1) == b""


@asynccontextmanager
async def client(door: Door) -> AsyncIterator[Client]:
    reader, writer = await asyncio.open_connection("127.0.0.1", door.port)
    try:
        yield Client(reader, writer)
    finally:
        writer.close()


@pytest.mark.parametrize("path", ["/health", "/healthz", "/livez"])
async def test_it_is_alive_whatever_its_shards_are_until_only_a_restart_helps(door: Door, path: str) -> None:
    door.pool.is_serving = False
    async with client(door) as one:
        status, headers = await one.ask(path)
        assert (status, await one.body(headers)) == (200, {"status": "ok"})
        door.why_dead = "nobody knows who may ask"
        status, headers = await one.ask(path)
        assert (status, (await one.body(headers))["why"]) == (503, "nobody knows who may ask")


@pytest.mark.parametrize("path", ["/ready", "/readyz"])
async def test_it_is_ready_while_a_shard_takes_requests(door: Door, path: str) -> None:
    async with client(door) as one:
        for is_serving, expected in ((True, (200, "ok")), (False, (503, "unavailable"))):
            door.pool.is_serving = is_serving
            status, headers = await one.ask(path)
            assert (status, (await one.body(headers))["status"]) == expected
            assert headers.get("retry-after") == (None if is_serving else "1")


async def test_every_answer_carries_the_name_that_its_client_gave(door: Door) -> None:
    async with client(door) as one:
        status, headers = await one.ask("/echo", **{"X-Request-Id": "mine:1"})
        assert (status, headers["x-request-id"], await one.body(headers)) == (200, "mine:1", {"id": "mine:1"})
        _, headers = await one.ask("/echo")
        assert len(headers["x-request-id"]) == 32 and await one.body(headers) == {"id": None}
        for name in ("x" * 129, "a b", "<script>", "\u00e9"):
            status, headers = await one.ask("/echo", **{"x-request-id": name})
            assert status == 400 and name not in headers["x-request-id"]
            assert (await one.body(headers))["error"]["param"] == "x-request-id"


async def test_one_that_stops_ends_its_connections_with_their_answers_and_refuses_what_comes_later(
    door: Door, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stopping, "SETTLE_S", 0.0)
    async with client(door) as idle, client(door) as unused, client(door) as probing, client(door) as streaming:
        _, headers = await idle.ask("/echo")
        await idle.body(headers)
        assert (await streaming.ask("/wait"))[0] == 200
        assert (await probing.ask("/ready"))[0] == 200
        while door.http.num_connections < 4:
            await asyncio.sleep(0.01)

        stopped = door.stop()

        assert await idle.is_closed(), "its client knows that it must open another"
        status, headers = await unused.ask("/echo")
        assert (status, headers["retry-after"], headers["connection"]) == (503, "1", "close")
        assert (await unused.body(headers))["error"]["code"] == 503 and await unused.is_closed()
        with pytest.raises(ConnectionRefusedError):
            await asyncio.open_connection("127.0.0.1", door.port)
        assert not stopped.done() and not door.pool.is_closed

        door.pool.ends.set()
        await asyncio.wait_for(stopped, 60)
        assert (await streaming.reader.read()).endswith(b"6\r\nended\n\r\n0\r\n\r\n")


async def test_a_request_that_comes_while_connections_are_closed_is_not_lost(
    door: Door, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It lies in the kernel, unread, when the ingress looks for idle connections."""
    monkeypatch.setattr(stopping, "SETTLE_S", 0.0)
    async with client(door) as one, client(door) as streaming:
        _, headers = await one.ask("/echo")
        await one.body(headers)
        await streaming.ask("/wait")
        (connection,) = [each for each in door.http.server_state.connections if not each.is_answering]
        connection.transport.pause_reading()
        asking = asyncio.create_task(one.ask("/echo"))
        await asyncio.sleep(0.05)
        stopped = door.stop()
        while not door.http.should_exit:
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.3)
        connection.transport.resume_reading()
        status, headers = await asking
        assert (status, headers["connection"]) == (503, "close")
        door.pool.ends.set()
        await asyncio.wait_for(stopped, 60)


async def test_a_connection_that_the_kernel_has_accepted_is_served_though_the_ingress_has_not_seen_it(
    door: Door, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stopping, "SETTLE_S", 60.0)  # it ends with the last connection
    with socket.create_connection(("127.0.0.1", door.port)) as unseen:  # the loop stands still meanwhile
        stopped = door.stop()
        await asyncio.sleep(0)  # it begins before the loop looks for connections
        reader, writer = await asyncio.open_connection(sock=unseen)
        status, headers = await Client(reader, writer).ask("/echo")
        assert (status, headers["connection"]) == (200, "close")
        await asyncio.wait_for(stopped, 60)


async def test_a_stream_that_outlasts_the_drain_ends_with_the_pools_word(door: Door) -> None:
    async with client(door) as streaming:
        await streaming.ask("/wait")
        await asyncio.wait_for(door.stop(0.1), 60)
        assert door.pool.is_closed
        assert (await streaming.reader.read()).endswith(b"0\r\n\r\n"), "what the pool said reached the client"


async def test_a_client_that_does_not_read_its_answer_cannot_keep_the_ingress(
    door: Door, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stopping, "FLUSH_S", 0.1)
    monkeypatch.setattr(door.pool, "close", lambda: asyncio.sleep(0))  # the stream never ends
    async with client(door) as streaming:
        await streaming.ask("/wait")
        await asyncio.wait_for(door.stop(0.1), 60)
        with pytest.raises((ConnectionResetError, asyncio.IncompleteReadError)):
            await streaming.reader.readexactly(1 << 20)
