"""The HTTP(S) side: sockets bound early, uvicorn without its signal handlers, `/health` that tells the truth."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import uvicorn

from moeray.ingress.certificates import Certificates, HttpProtocol

if TYPE_CHECKING:
    from fastapi import FastAPI

    from moeray.ingress.shard_pool import ShardPool


def add_health(app: FastAPI, pool: ShardPool) -> None:
    """`/health`: 200 while at least one shard takes requests, else 503 with the reason."""
    from fastapi.responses import JSONResponse

    async def health() -> JSONResponse:
        ready = pool.is_serving
        body: dict[str, Any] = {"status": "ok" if ready else "unavailable", "shards": pool.describe()}
        return JSONResponse(body, status_code=200 if ready else 503, headers={} if ready else {"Retry-After": "1"})

    app.add_api_route("/health", health, methods=["GET"])


class _Server(uvicorn.Server):
    """Signals belong to the process that hosts the ingress."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


async def start_http(
    app: FastAPI,
    listener: socket.socket,
    certificates: Certificates | None = None,
    door: Callable[[Any], Any] | None = None,
) -> tuple[uvicorn.Server, asyncio.Task[None]]:
    """Serve until `should_exit` is set; returns once connections are accepted.

    Args:
        certificates: HTTPS with these; None serves HTTP.
        door: puts an ASGI application in front of `app`.
    """
    served = app if door is None else door(app)
    config = uvicorn.Config(
        served, log_level="warning", access_log=False, timeout_keep_alive=5, lifespan="on", http=HttpProtocol,
        ssl_context_factory=None if certificates is None else (lambda *_: certificates.for_http()),
    )  # fmt: skip
    server = _Server(config)
    app.state.server = server  # vLLM's error handlers look for it
    task = asyncio.create_task(server.serve(sockets=[listener]), name="http")
    while not server.started:
        if task.done():
            task.result()
            raise RuntimeError("the HTTP server ended while it started")
        await asyncio.sleep(0.01)
    return server, task
