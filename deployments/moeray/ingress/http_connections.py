"""HTTP connections: how many, how large and how slow a head may be; a sweep once a second closes what is slow.

The hot path keeps times and counts only.
"""

from __future__ import annotations

import asyncio
import resource
from collections.abc import Iterable
from typing import Any, Final

from moeray.config import IngressConfig
from moeray.ingress.certificates import HttpProtocol

MAX_HEADERS = 128
MAX_PIPELINED = 16
"""Requests that wait for the answer to an earlier one of their connection."""

LINGER_S = 5.0
"""A request that was answered before it was complete may go on for so long: a reset would lose the answer."""

SPARE_FILES = 1024
"""File descriptors that are not clients' connections: shards, Redis, files, gRPC."""

_HEAD_TOO_LARGE: Final = 431
_UNAVAILABLE: Final = 503
_PHRASES = {
    408: "Request Timeout",
    _HEAD_TOO_LARGE: "Request Header Fields Too Large",
    _UNAVAILABLE: "Service Unavailable",
}


class Connections:
    """Those of one HTTP server. What is not served yet gives way to newcomers, the one that waits longest first."""

    def __init__(self, limits: IngressConfig) -> None:
        self.limits = limits
        most_files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        room = max(most_files - SPARE_FILES, most_files // 2)
        self.most = min(limits.max_connections, room)
        self._unserved: dict[BoundedHttpProtocol, None] = {}

    def wait(self, connection: BoundedHttpProtocol) -> None:
        """It has no request in hand."""
        self._unserved.pop(connection, None)
        self._unserved[connection] = None

    def serve(self, connection: BoundedHttpProtocol) -> None:
        """It has a request in hand, or is gone."""
        self._unserved.pop(connection, None)

    def make_room(self, num_open: int) -> bool:
        """Whether one more may stay."""
        if num_open <= self.most:
            return True
        if not self._unserved:
            return False
        oldest = next(iter(self._unserved))
        self.serve(oldest)
        oldest.transport.close()
        return True


class BoundedHttpProtocol(HttpProtocol):
    """One connection."""

    def __init__(self, *args: Any, bounds: Connections, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._bounds = bounds
        self._since = self.loop.time()
        self._is_receiving = False
        self._began = self._head_done = False
        self._num_overhead = self._num_body = self._num_head = 0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        if self._bounds.make_room(len(self.connections)):
            self._bounds.wait(self)
        else:
            self._end(_UNAVAILABLE)

    def connection_lost(self, exc: Exception | None) -> None:
        self._bounds.serve(self)
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        self._began = False
        before = self._num_body
        super().data_received(data)
        if self._began:  # where in the data, nobody knows; what one read takes is bounded
            self._num_overhead = self._num_body = 0
        elif self._is_receiving:
            self._num_overhead += len(data) - (self._num_body - before)
            # What is no body: the head, and around chunks, for which honest ones are large.
            if self._num_overhead > self._bounds.limits.max_header_bytes + self._num_body:
                self._end(_HEAD_TOO_LARGE)

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._began = self._is_receiving = True
        self._head_done = False
        self._num_head = 0
        self._since = self.loop.time()

    def on_header(self, name: bytes, value: bytes) -> None:
        super().on_header(name, value)
        self._num_head += len(name) + len(value)
        if len(self.headers) > MAX_HEADERS or self._num_head > self._bounds.limits.max_header_bytes:
            self._end(_HEAD_TOO_LARGE)  # trailers too

    def on_headers_complete(self) -> None:
        self._head_done = True
        self._since = self.loop.time()
        if len(self.url) > self._bounds.limits.max_header_bytes:
            self._end(_HEAD_TOO_LARGE)
        if self.transport.is_closing():
            return
        self._bounds.serve(self)
        super().on_headers_complete()
        if len(self.pipeline) > MAX_PIPELINED:
            self.transport.abort()

    def on_body(self, body: bytes) -> None:
        self._num_body += len(body)
        if self.cycle is not None and not self.transport.is_closing():
            super().on_body(body)

    def on_message_complete(self) -> None:
        self._is_receiving = False
        if self.cycle is not None and not self.transport.is_closing():
            super().on_message_complete()

    def on_response_complete(self) -> None:
        self._since = self.loop.time()
        super().on_response_complete()
        if not self.pipeline and not self.transport.is_closing():
            self._bounds.wait(self)

    def sweep(self, now: float) -> None:
        """Close it if its client has been too slow; `now` is the loop's time."""
        if self.transport is None or self.transport.is_closing():
            return
        answered = self.cycle is None or self.cycle.response_complete
        if self.pipeline or not answered:  # a body that is read has HttpLimits' bound; a slow answer is no fault
            self._since = now
            return
        limit_s = LINGER_S if self._is_receiving and self._head_done else self._bounds.limits.head_timeout_s
        if now - self._since > limit_s:
            self._end(408 if self._is_receiving and not self._head_done else None)

    def _end(self, status: int | None) -> None:
        """Close, with an answer where none has begun."""
        if self.transport.is_closing():
            return
        if status is not None and (self.cycle is None or self.cycle.response_complete):
            line = f"HTTP/1.1 {status} {_PHRASES[status]}\r\ncontent-length: 0\r\nconnection: close\r\n\r\n"
            self.transport.write(line.encode())
        self.transport.close()


def sweep(connections: Iterable[Any], now: float) -> None:
    """Close those that are too slow."""
    for connection in tuple(connections):
        if isinstance(connection, BoundedHttpProtocol):
            connection.sweep(now)
