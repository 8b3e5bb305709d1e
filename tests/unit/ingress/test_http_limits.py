"""What a client may send over HTTP: each bound has its status, and what is refused costs nobody else anything."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any, cast

import pytest
from fastapi import FastAPI, Request, UploadFile

from moeray.config import BatchConfig, ConfigError, IngressConfig, parse_config
from moeray.ingress.arrivals import Arrivals
from moeray.ingress.body_shape import MAX_DEPTH
from moeray.ingress.http_connections import MAX_HEADERS, MAX_PIPELINED
from moeray.ingress.http_limits import UPLOAD_MARGIN_BYTES
from moeray.ingress.http_server import add_probes, start_http

if TYPE_CHECKING:
    from moeray.ingress.shard_pool import ShardPool

SMALL = {"max_body_bytes": 4096, "max_bodies_bytes": 8192, "max_header_bytes": 2048}
WAIT_S = 60


def _app(release: asyncio.Event) -> FastAPI:
    app = FastAPI()

    @app.post("/size")
    async def size(request: Request) -> int:
        return len(await request.body())

    @app.post("/held")
    async def held(request: Request) -> int:
        body = await request.body()
        await release.wait()
        return len(body)

    @app.post("/file")
    async def file(file: UploadFile) -> int:
        return len(await file.read())

    @app.get("/health")
    async def health() -> str:
        return "ok"

    return app


class Door:
    """A server on loopback. Attributes: release: lets /held answer."""

    def __init__(self, port: int, release: asyncio.Event, server: Any) -> None:
        self.port, self.release, self.server = port, release, server

    async def open(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        return await asyncio.open_connection("127.0.0.1", self.port)

    async def send(self, *parts: bytes) -> tuple[int, bytes]:
        """(status, everything) of the answer to raw bytes; 0 where the connection ends without one."""
        reader, writer = await self.open()
        for part in parts:
            writer.write(part)
            await asyncio.sleep(0.01)
        return await answer_of(reader, writer)

    async def post(self, path: str, body: bytes, **headers: str) -> tuple[int, bytes]:
        lines = "".join(f"{name.replace('_', '-')}: {value}\r\n" for name, value in headers.items())
        head = f"POST {path} HTTP/1.1\r\nhost: a\r\nconnection: close\r\ncontent-length: {len(body)}\r\n{lines}\r\n"
        return await self.send(head.encode() + body)


async def answer_of(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> tuple[int, bytes]:
    try:
        async with asyncio.timeout(WAIT_S):
            got = await reader.read(1 << 20)
            while more := await reader.read(1 << 20):
                got += more
    except ConnectionError:
        got = b""
    finally:
        writer.close()
    return (int(got.split(b" ", 2)[1]) if got else 0), got


@asynccontextmanager
async def door(**limits: Any) -> AsyncIterator[Door]:
    listener = socket.create_server(("127.0.0.1", 0))
    release = asyncio.Event()
    bounds = IngressConfig(**{**SMALL, **limits})
    server = await start_http(_app(release), listener, Arrivals(), limits=bounds)
    yield Door(listener.getsockname()[1], release, server)
    release.set()
    await server.end(0.0)


def error_of(got: bytes) -> str:
    return str(json.loads(got.split(b"\r\n\r\n", 1)[1])["error"]["message"])


async def test_a_body_within_the_bound_arrives_whole_and_a_larger_one_is_a_413_that_names_the_key() -> None:
    async with door() as at:
        assert (await at.post("/size", b"x" * 4096))[1].endswith(b"4096")
        status, got = await at.post("/size", b"x" * 4097)

    assert status == 413
    assert "ingress.max_body_bytes" in error_of(got)


async def test_a_body_that_is_announced_as_too_large_is_not_waited_for() -> None:
    async with door(body_timeout_s=3600) as at:
        assert (await at.send(b"POST /size HTTP/1.1\r\nhost: a\r\ncontent-length: 4097\r\n\r\n"))[0] == 413


async def test_a_body_of_unknown_length_is_cut_at_the_bound() -> None:
    chunk = b"400\r\n" + b"x" * 1024 + b"\r\n"
    async with door() as at:
        head = b"POST /size HTTP/1.1\r\nhost: a\r\nconnection: close\r\ntransfer-encoding: chunked\r\n\r\n"
        assert (await at.send(head + 4 * chunk + b"0\r\n\r\n"))[1].endswith(b"4096")
        assert (await at.send(head + 5 * chunk))[0] == 413


@pytest.mark.parametrize("encoding", ["gzip", "br", "deflate", "zstd", "gzip, identity"])
async def test_a_body_that_would_have_to_be_unpacked_is_refused(encoding: str) -> None:
    async with door() as at:
        status, got = await at.post("/size", b"x", content_encoding=encoding)
        assert (await at.post("/size", b"x", content_encoding="identity"))[0] == 200

    assert status == 415
    assert b"accept-encoding: identity" in got


async def test_json_that_nests_too_deep_is_a_400_whatever_its_strings_hold() -> None:
    deep = b"[" * (MAX_DEPTH + 1)
    async with door() as at:
        assert (await at.post("/size", deep))[0] == 400
        assert (await at.post("/size", json.dumps(deep.decode()).encode()))[0] == 200


async def test_bodies_of_all_requests_together_are_bounded_and_given_back() -> None:
    async with door() as at:
        first = [asyncio.create_task(at.post("/held", b"x" * 4096)) for _ in range(2)]
        status = 0
        async with asyncio.timeout(WAIT_S):
            while status != 503:
                status, got = await at.post("/size", b"x" * 4096)
        assert "ingress.max_bodies_bytes" in error_of(got) and b"retry-after: 1" in got
        at.release.set()
        assert [status for status, _ in await asyncio.gather(*first)] == [200, 200]
        assert (await at.post("/size", b"x" * 4096))[0] == 200


async def test_a_body_that_does_not_come_is_a_408() -> None:
    async with door(body_timeout_s=0.2) as at:
        status, got = await at.send(b"POST /size HTTP/1.1\r\nhost: a\r\ncontent-length: 10\r\n\r\nabc")

    assert status == 408
    assert "ingress.body_timeout_s" in error_of(got)


@pytest.mark.parametrize("sent", [b"", b"\r\n", b"GET /health HTT", b"GET /health HTTP/1.1\r\nx: y\r\nz"])
async def test_a_head_that_does_not_come_ends_the_connection(sent: bytes) -> None:
    async with door(head_timeout_s=0.2) as at:
        status, _ = await at.send(sent)

    assert status == (408 if sent.strip() else 0)


async def test_a_slow_head_does_not_gain_time_by_sending_on() -> None:
    async with door(head_timeout_s=0.5) as at:
        reader, writer = await at.open()
        writer.write(b"GET /health HTTP/1.1\r\n")
        answered = asyncio.create_task(answer_of(reader, writer))
        while not answered.done():
            writer.write(b"a: b\r\n")
            await asyncio.sleep(0.1)
        assert (await answered)[0] in (0, 408)


async def test_a_slow_answer_is_no_slow_request() -> None:
    async with door(head_timeout_s=0.2, body_timeout_s=0.2) as at:
        asked = asyncio.create_task(at.post("/held", b"x"))
        await asyncio.sleep(2.5)  # the sweep comes once a second
        at.release.set()
        assert (await asked)[0] == 200


@pytest.mark.parametrize(
    "head",
    [
        [b"x: " + b"y" * 3000],
        [b"x: " + b"y" * 100_000],
        [b"x" * 3000 + b": y"],
        [b"x%d: y" % i for i in range(MAX_HEADERS + 1)],
    ],
    ids=["one value", "one value, several reads", "one name", "many"],
)
async def test_headers_beyond_the_bound_are_a_431(head: list[bytes]) -> None:
    async with door() as at:
        status, _ = await at.send(b"GET /health HTTP/1.1\r\nhost: a\r\n", b"\r\n".join(head) + b"\r\n\r\n")
        assert (await at.send(b"GET /health HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n"))[0] == 200

    assert status in (0, 431)  # a reset may overtake the answer


async def test_a_head_without_an_end_does_not_fill_memory() -> None:
    async with door() as at:
        reader, writer = await at.open()
        writer.write(b"GET /health HTTP/1.1\r\nx: ")
        sent = 0
        with contextlib.suppress(ConnectionError):
            while sent < 1000 << 16:
                writer.write(b"y" * 65536)
                await writer.drain()
                sent += 65536
        assert sent < 1000 << 16
        assert (await answer_of(reader, writer))[0] in (0, 431)


async def test_a_url_and_trailers_count_as_headers() -> None:
    chunked = b"POST /size HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked\r\n\r\n1\r\nx\r\n0\r\n"
    async with door() as at:
        assert (await at.send(b"GET /health?" + b"x" * 3000 + b" HTTP/1.1\r\nhost: a\r\n\r\n"))[0] in (0, 431)
        assert (await at.send(chunked, b"t: " + b"y" * 3000 + b"\r\n\r\n"))[0] != 200


async def test_chunks_of_one_byte_do_not_grow_without_a_bound() -> None:
    async with door(max_body_bytes=1 << 20, max_bodies_bytes=1 << 20) as at:
        head = b"POST /size HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked\r\n\r\n"
        extension = b"1;" + b"e" * 4000 + b"\r\nx\r\n"
        assert (await at.send(head, *(extension for _ in range(20))))[0] == 0


async def test_a_form_streams_within_the_bound_of_its_own() -> None:
    batches = BatchConfig(directory="somewhere", max_file_bytes=20_000)
    part = b'--b\r\ncontent-disposition: form-data; name="file"; filename="f"\r\n\r\n%s\r\n--b--\r\n'
    kind = {"content_type": "multipart/form-data; boundary=b"}
    async with door(batches=batches) as at:
        assert (await at.post("/file", part % (b"x" * 20_000), **kind))[1].endswith(b"20000")
        too_large = part % (b"x" * (20_000 + UPLOAD_MARGIN_BYTES))
        assert (await at.post("/file", too_large, **kind))[0] == 413
        head = b"POST /file HTTP/1.1\r\nhost: a\r\ncontent-type: multipart/form-data; boundary=b\r\n"
        chunked = b"transfer-encoding: chunked\r\nconnection: close\r\n\r\n%x\r\n%s\r\n0\r\n\r\n"
        assert (await at.send(head + chunked % (len(too_large), too_large)))[0] == 413


async def test_connections_are_bounded_and_those_that_ask_nothing_give_way() -> None:
    async with door(max_connections=8, head_timeout_s=3600) as at:
        idle = [await at.open() for _ in range(20)]
        assert (await at.send(b"GET /health HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n"))[0] == 200
        ended = [reader.read() for reader, _ in idle[:12]]
        assert await asyncio.wait_for(asyncio.gather(*ended), WAIT_S) == [b""] * 12
        assert len(at.server.server_state.connections) <= 9
        for _, writer in idle:
            writer.close()


async def test_connections_in_use_do_not_give_way() -> None:
    async with door(max_connections=2) as at:
        used = [asyncio.create_task(at.post("/held", b"x")) for _ in range(2)]
        status = 200
        async with asyncio.timeout(WAIT_S):
            while status == 200:
                status, _ = await at.send(b"GET /health HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n")
        assert status in (0, 503)
        at.release.set()
        assert [status for status, _ in await asyncio.gather(*used)] == [200, 200]


async def test_requests_that_wait_behind_a_slow_one_are_bounded() -> None:
    async with door() as at:
        held = b"POST /held HTTP/1.1\r\nhost: a\r\ncontent-length: 1\r\n\r\nx"
        more = b"GET /health HTTP/1.1\r\nhost: a\r\n\r\n"
        assert (await at.send(held + more * (MAX_PIPELINED + 1)))[0] == 0
        last = b"GET /health HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n"
        asked = asyncio.create_task(at.send(held + more * (MAX_PIPELINED - 1) + last))
        await asyncio.sleep(0.2)
        at.release.set()
        assert (await asked)[1].count(b"HTTP/1.1 200") == MAX_PIPELINED + 1


@pytest.mark.parametrize(
    "raw",
    [
        b"\x16\x03\x01\x02\x00\x01",
        b"GET\r\n\r\n",
        b"GET / HTTP/9.9\r\n\r\n",
        b"GET /\xff HTTP/1.1\r\nhost: a\r\n\r\n",
        b"POST /size HTTP/1.1\r\nhost: a\r\ncontent-length: -1\r\n\r\n",
        b"POST /size HTTP/1.1\r\nhost: a\r\ncontent-length: 1\r\ncontent-length: 2\r\n\r\nx",
        b"POST /size HTTP/1.1\r\nhost: a\r\ncontent-length: 1\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n",
        b"POST /size HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked\r\n\r\nzz\r\n",
        b"GET / HTTP/1.1\r\n: y\r\n\r\n",
        b"GET / HTTP/1.1\r\nx: a\x00b\r\n\r\n",
    ],
)
async def test_what_is_no_http_is_a_400(raw: bytes) -> None:
    async with door() as at:
        assert (await at.send(raw))[0] == 400


def test_the_openapi_document_can_be_made_and_names_health() -> None:
    app, pool = FastAPI(), cast("ShardPool", None)
    add_probes(app, pool, Arrivals(), lambda: "")

    assert "/health" in app.openapi()["paths"]


async def test_an_upgrade_is_not_taken() -> None:
    async with door() as at:
        head = b"GET /health HTTP/1.1\r\nhost: a\r\nconnection: upgrade, close\r\nupgrade: websocket\r\n"
        assert (await at.send(head + b"sec-websocket-version: 13\r\nsec-websocket-key: eA==\r\n\r\n"))[0] == 200


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("max_body_bytes", 1),
        ("max_header_bytes", 0),
        ("head_timeout_s", 0),
        ("body_timeout_s", -1),
        ("max_connections", 0),
    ],
)
def test_a_bound_that_bounds_nothing_is_refused(key: str, value: float) -> None:
    with pytest.raises(ConfigError, match=f"ingress.{key}"):
        parse_config({"ingress": {key: value}})


def test_one_body_fits_into_all_bodies() -> None:
    with pytest.raises(ConfigError, match=r"ingress\.max_bodies_bytes"):
        parse_config({"ingress": {"max_body_bytes": 4096, "max_bodies_bytes": 4095}})
