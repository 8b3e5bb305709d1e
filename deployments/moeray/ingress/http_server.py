"""The HTTP(S) side: sockets bound early, uvicorn without its signal handlers, probes that tell the truth."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import socket
import struct
import termios
from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING, Any

import uvicorn

from moeray.config import IngressConfig
from moeray.ingress.certificates import Certificates
from moeray.ingress.http_arrivals import ALIVE_PATHS, READY_PATHS, HttpArrivals
from moeray.ingress.http_connections import BoundedHttpProtocol, Connections, sweep
from moeray.ingress.http_limits import HttpLimits

if TYPE_CHECKING:
    from fastapi import FastAPI

    from moeray.ingress.arrivals import Arrivals
    from moeray.ingress.shard_pool import ShardPool


def add_probes(app: FastAPI, pool: ShardPool, arrivals: Arrivals, why_dead: Callable[[], str]) -> None:
    """`/health`, `/healthz`, `/livez`: 200 while a restart would not help. `/ready`, `/readyz`: 200 while requests are
    taken now, else 503; with the state of each shard. Anybody may ask, so it tells no address.

    Args:
        why_dead: what only a restart ends; empty if there is nothing.
    """
    from fastapi.responses import JSONResponse

    async def health() -> JSONResponse:
        why = why_dead()
        return JSONResponse({"status": "failed", "why": why} if why else {"status": "ok"}, 503 if why else 200)

    async def ready() -> JSONResponse:
        status = "stopping" if arrivals.is_leaving else "ok" if pool.is_serving else "unavailable"
        shards = {name: {"state": shard["state"]} for name, shard in pool.describe().items()}
        body: dict[str, Any] = {"status": status, "shards": shards}
        return JSONResponse(body, 200, {}) if status == "ok" else JSONResponse(body, 503, {"Retry-After": "1"})

    for path in ALIVE_PATHS:
        app.add_api_route(path, health, methods=["GET"], response_model=None, include_in_schema=path == ALIVE_PATHS[0])
    for path in READY_PATHS:
        app.add_api_route(path, ready, methods=["GET"], response_model=None, include_in_schema=path == READY_PATHS[0])


class _Protocol(BoundedHttpProtocol):
    """One connection."""

    def shutdown(self) -> None:
        """Close if idle. One whose client is asking just now, or has yet to ask for the first time, is answered first:
        to close it would cost that request.
        """
        if self.cycle is not None and not _num_unread(self.transport):
            super().shutdown()

    @property
    def is_answering(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete


class HttpServer(uvicorn.Server):
    """To stop it: `leave`, `close_idle`, `end`. Signals belong to the process that hosts the ingress."""

    def __init__(self, config: uvicorn.Config, listener: socket.socket) -> None:
        super().__init__(config)
        self.task: asyncio.Task[None] | None = None
        self._listener = listener
        self._late: set[asyncio.Task[Any]] = set()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield

    async def on_tick(self, counter: int) -> bool:
        """Ten times a second."""
        if counter % 10 == 0:
            sweep(self.server_state.connections, asyncio.get_running_loop().time())
        return await super().on_tick(counter)

    @property
    def num_connections(self) -> int:
        return len(self.server_state.connections) + len(self._late)

    @property
    def num_unasked(self) -> int:
        """Connections on which no request has come yet: one must be on its way."""
        return len(self._late) + sum(getattr(each, "cycle", None) is None for each in self.server_state.connections)

    def leave(self) -> None:
        """Stop listening. Connections that the kernel has given to this ingress already are taken: it would reset them,
        also where another ingress listens.
        """
        if not self.started:
            return
        loop = asyncio.get_running_loop()
        self._listener.setblocking(False)
        with contextlib.suppress(OSError):  # BlockingIOError: there are no more
            while True:
                connection, _ = self._listener.accept()
                task = loop.create_task(loop.connect_accepted_socket(self._protocol, connection, ssl=self.config.ssl))
                self._late.add(task)
                task.add_done_callback(self._taken)
        for server in self.servers:
            server.close()

    def close_idle(self) -> None:
        """Close the connections that wait for nothing, those that are answered after their answer."""
        self.should_exit = True

    async def end(self, timeout_s: float) -> None:
        """Close every connection, after what is written if its client reads that in time; returns when all is over."""
        self.should_exit = True
        for connection in list(self.server_state.connections):
            if not connection.is_answering:  # type: ignore[union-attr]
                connection.transport.close()
        assert self.task is not None, "start_http() first"
        await asyncio.wait([self.task], timeout=timeout_s)
        self.force_exit = True
        for connection in list(self.server_state.connections):
            connection.transport.abort()
        await self.task

    def _protocol(self) -> asyncio.Protocol:
        make: Any = self.config.http_protocol_class
        made: asyncio.Protocol = make(self.config, self.server_state, self.lifespan.state)
        return made

    def _taken(self, task: asyncio.Task[Any]) -> None:
        self._late.discard(task)
        if not task.cancelled():
            task.exception()  # a client that is gone, or spoke no TLS


async def start_http(
    app: FastAPI,
    listener: socket.socket,
    arrivals: Arrivals,
    certificates: Certificates | None = None,
    limits: IngressConfig | None = None,
    door: Callable[[Any], Any] | None = None,
) -> HttpServer:
    """Serve until it is stopped; returns once connections are accepted.

    Args:
        certificates: HTTPS with these; None serves HTTP.
        limits: bounds of bodies and connections.
        door: puts an ASGI application in front of `app`, before a body is read; probes do not pass it.
    """
    limits = limits or IngressConfig()
    bounded: Any = HttpLimits(app, limits)
    served = HttpArrivals(bounded if door is None else door(bounded), app, arrivals)
    # A stranger must not be able to fill the log: what he sends wrong is a warning to uvicorn.
    config = uvicorn.Config(
        served, log_level="error", access_log=False, timeout_keep_alive=5, lifespan="on", ws="none",
        http=partial(_Protocol, bounds=Connections(limits)),  # type: ignore[arg-type]
        ssl_context_factory=None if certificates is None else (lambda *_: certificates.for_http()),
    )  # fmt: skip
    server = HttpServer(config, listener)
    app.state.server = server  # vLLM's error handlers look for it
    task = server.task = asyncio.create_task(server.serve(sockets=[listener]), name="http")
    while not server.started:
        if task.done():
            task.result()
            raise RuntimeError("the HTTP server ended while it started")
        await asyncio.sleep(0.01)
    return server


def _num_unread(transport: asyncio.BaseTransport) -> int:
    """Bytes that the kernel holds for this connection."""
    fd = transport.get_extra_info("socket").fileno()
    if fd < 0:
        return 0
    unread: int = struct.unpack("i", fcntl.ioctl(fd, termios.FIONREAD, b"\0" * 4))[0]
    return unread
