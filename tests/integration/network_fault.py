"""What a network can do to the link between an ingress and a shard: cut it, or let nothing through any more."""

from __future__ import annotations

import asyncio
import contextlib


class Proxy:
    """Forwards one port of 127.0.0.1 to another. Lives on the event loop that started it."""

    def __init__(self, address: str) -> None:
        self._host, _, port = address.rpartition(":")
        self._port = int(port)
        self._flows = asyncio.Event()
        self._flows.set()
        self._writers: set[asyncio.StreamWriter] = set()

    @property
    def is_held(self) -> bool:
        return not self._flows.is_set()

    async def start(self) -> str:
        """Returns where it listens."""
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        return f"127.0.0.1:{self._server.sockets[0].getsockname()[1]}"

    def cut(self) -> None:
        """End every connection; new ones are welcome."""
        for writer in self._writers:
            writer.transport.abort()

    def hold(self) -> None:
        """Connections stay open, and nothing passes: a lost node, a dead switch."""
        self._flows.clear()

    def release(self) -> None:
        self._flows.set()

    async def stop(self) -> None:
        self._server.close()
        self.release()
        self.cut()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            there, back = await asyncio.open_connection(self._host, self._port)
        except OSError:
            writer.transport.abort()
            return
        self._writers |= {writer, back}
        await asyncio.gather(self._forward(reader, back), self._forward(there, writer))
        self._writers -= {writer, back}

    async def _forward(self, source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while data := await source.read(1 << 16):
                await self._flows.wait()
                sink.write(data)
                await sink.drain()
        sink.close()
