"""A lease is an open TCP connection to the controller: end-of-file or silence ends the membership.

Ray says nothing to an actor when another one dies; a closed socket does, within milliseconds, for every way a process
can end. The wire is one line with the token that `join` gave the member, then one newline per beat.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import threading
from collections.abc import Callable

from moeray.mutual_tls import ClusterCertificate, hang_up

logger = logging.getLogger(__name__)

MAX_ID_BYTES = 256
CONNECT_S = 10.0


class LeaseServer:
    """The controller's end. `on_lost(id, reason)` is called once per lease, on the event loop."""

    def __init__(
        self, on_lost: Callable[[str, str], None], *, silence_s: float, certificate: ClusterCertificate | None = None
    ) -> None:
        self._on_lost = on_lost
        self._tls = None if certificate is None else certificate.for_server()
        self._silence_s = silence_s
        self._server: asyncio.Server | None = None
        self._writers: set[asyncio.StreamWriter] = set()
        self._expected: dict[str, str] = {}

    async def start(self, host: str) -> str:
        """Listen on an ephemeral port of `host`; returns host:port."""
        self._server = await asyncio.start_server(self._hold, host, 0, limit=MAX_ID_BYTES, ssl=self._tls)
        port = self._server.sockets[0].getsockname()[1]
        return f"{host}:{port}"

    def expect(self, token: str, id: str) -> None:
        """A member was given `token`; if it does not come within the silence, it is lost."""
        self._expected[token] = id
        asyncio.get_running_loop().call_later(self._silence_s, self._never_came, token)

    def _never_came(self, token: str) -> None:
        if (id := self._expected.pop(token, None)) is not None:
            self._on_lost(id, f"did not open its lease within {self._silence_s:g} s")

    async def close(self) -> None:
        """Stop listening and end every lease; their holders notice."""
        if self._server is not None:
            self._server.close()
        for writer in self._writers:
            writer.close()

    async def _hold(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        id, reason = "", "connection closed"
        self._writers.add(writer)
        try:
            token = (await asyncio.wait_for(reader.readline(), self._silence_s)).decode(errors="replace").strip()
            id = self._expected.pop(token, "")
            while id and await self._beats(reader):
                pass
        except TimeoutError:
            reason = f"silent for {self._silence_s:g} s"
        except (OSError, ValueError) as error:
            reason = str(error) or type(error).__name__
        finally:
            self._writers.discard(writer)
            writer.close()
        if id:
            self._on_lost(id, reason)

    async def _beats(self, reader: asyncio.StreamReader) -> bool:
        """Whether the connection still lives: waits for the next beat."""
        data: bytes = await asyncio.wait_for(reader.read(MAX_ID_BYTES), self._silence_s)
        return bool(data)


class Lease:
    """A member's end. Beats from a thread of its own: imports and model loading block the event loop for seconds."""

    def __init__(
        self,
        address: str,
        token: str,
        *,
        beat_s: float,
        silence_s: float,
        certificate: ClusterCertificate | None = None,
    ) -> None:
        """Nothing is connected yet.

        Args:
            beat_s: from one beat to the next.
            silence_s: the lease is lost when the controller's machine acknowledges no beat for so long.
        """
        self._address = address
        self._token = token
        self._certificate = certificate
        self._beat_s, self._silence_s = beat_s, silence_s
        self._connection: socket.socket | None = None
        self._loop = asyncio.get_running_loop()
        self.lost = asyncio.Event()

    async def start(self) -> None:
        """Connect, then beat in the background until `close`; `lost` is set if the controller goes away.

        Raises:
            OSError: the controller's port does not answer.
            CertificateError: a file of `cluster_tls` cannot be used.
        """
        self._connection = await asyncio.to_thread(self._dial)
        # A cut network closes nothing; without this the kernel would try to deliver the beats for a quarter of an hour.
        self._connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, round(self._silence_s * 1000))
        self._connection.sendall(f"{self._token}\n".encode())
        threading.Thread(target=self._beat, args=(self._connection,), name="lease", daemon=True).start()

    def close(self) -> None:
        """End the membership; idempotent."""
        if self._connection is not None:
            hang_up(self._connection)

    def _dial(self) -> socket.socket:
        host, port = self._address.rsplit(":", 1)
        connection = socket.create_connection((host, int(port)), CONNECT_S)
        return connection if self._certificate is None else self._certificate.dialled(connection)

    def _beat(self, connection: socket.socket) -> None:
        connection.settimeout(self._beat_s)
        try:
            while True:
                connection.sendall(b"\n")
                try:
                    if not connection.recv(1):  # the controller never writes: this is the end of the connection
                        break
                except TimeoutError:
                    continue
        except OSError as error:
            logger.warning("lease: %s", error)
        finally:
            connection.close()
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody is left to be told
                self._loop.call_soon_threadsafe(self.lost.set)
