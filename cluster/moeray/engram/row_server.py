"""A process' end of the row protocol: it holds a share of the tables and answers any shard of its cluster.

No arithmetic is done on a row: what is sent are the checkpoint's bytes.
"""

from __future__ import annotations

import logging
import socket
import ssl
import threading
import zlib
from dataclasses import dataclass
from time import monotonic, sleep

from moeray.config import ClusterTlsConfig
from moeray.engram.held_rows import HeldRows
from moeray.engram.row_wire import (
    CHECKSUM,
    REQUEST_HEAD,
    RowHello,
    WireError,
    answer_head,
    body_bytes,
    refusal,
    requested,
)
from moeray.mutual_tls import ClusterCertificate, hang_up
from moeray.transport.errors import HandshakeRefused
from moeray.transport.handshake import receive_message, send_message
from moeray.transport.rendezvous import keep_alive

logger = logging.getLogger(__name__)

HELLO_S = 5.0
SEND_S = 30.0
"""A client that takes no bytes for so long is dropped."""
MAX_CONNECTIONS = 512
TOGETHER_BYTES = 1 << 16
"""A small answer goes out in one call."""


@dataclass(slots=True, eq=False)
class _Client:
    connection: socket.socket
    address: str
    name: str = "?"


class RowServer:
    """Listens from `start` to `stop`; a thread per client.

    Args:
        host: the only address listened on; port 0 takes a free one.
        tls: if it is on, only processes of this cluster are spoken to, encrypted.
    Raises:
        CertificateError: a file of `tls` cannot be used.
    """

    def __init__(
        self, held: HeldRows, *, host: str = "127.0.0.1", port: int = 0, tls: ClusterTlsConfig | None = None
    ) -> None:
        self._held, self._host, self._port = held, host, port
        self._certificate = ClusterCertificate.of(tls)
        self._lock = threading.Lock()
        self._clients: list[_Client] = []
        self._listener: socket.socket | None = None
        self._rows_sent = 0

    @property
    def rows_sent(self) -> int:
        """Since the start, to all clients."""
        return self._rows_sent

    def start(self) -> str:
        """Listen; returns "host:port".

        Raises:
            OSError: the address cannot be bound.
        """
        self._listener = socket.create_server((self._host, self._port), backlog=128)
        threading.Thread(target=self._accept, args=(self._listener,), name="moeray-rows", daemon=True).start()
        return f"{self._host}:{self._listener.getsockname()[1]}"

    def stop(self) -> None:
        """Refuse new clients and cut the connected ones: they ask another server. Idempotent."""
        listener, self._listener = self._listener, None
        if listener is not None:
            listener.shutdown(socket.SHUT_RDWR)
            listener.close()
        with self._lock:
            clients = list(self._clients)
        for client in clients:
            hang_up(client.connection)

    def _accept(self, listener: socket.socket) -> None:
        while True:
            try:
                connection, address = listener.accept()
                if self._certificate is not None:
                    connection = self._certificate.accepting(connection)
            except OSError:
                if self._listener is None:
                    return
                sleep(0.05)
                continue  # the peer gave up before it was accepted, or descriptors are short for a moment
            client = _Client(connection, f"{address[0]}:{address[1]}")
            with self._lock:
                accepted = len(self._clients) < MAX_CONNECTIONS
                if accepted:
                    self._clients.append(client)
            if not accepted:
                connection.close()
                continue
            threading.Thread(target=self._run, args=(client,), name="moeray-rows", daemon=True).start()

    def _run(self, client: _Client) -> None:
        try:
            self._greet(client)
            while self._answer(client.connection):
                pass
            logger.info("row server %d: %s went away", self._held.server, client.name)
        except (OSError, WireError, HandshakeRefused) as error:
            logger.warning("row server %d dropped %s (%s): %s", self._held.server, client.name, client.address, error)
        finally:
            with self._lock:
                self._clients.remove(client)
            client.connection.close()

    def _greet(self, client: _Client) -> None:
        connection, shares = client.connection, self._held.shares
        keep_alive(connection)
        deadline = monotonic() + HELLO_S
        if isinstance(connection, ssl.SSLSocket):
            connection.settimeout(HELLO_S)
            connection.do_handshake()
        ours = RowHello.of(
            f"row server {self._held.server}", self._held.tables, self._held.server, shares.num_servers, shares.copies
        )
        theirs = receive_message(connection, deadline)
        refused = ours.disagreement(theirs)
        send_message(connection, {**ours.to_json(), "refused": refused}, deadline)
        client.name = str(theirs.get("sender"))[:100]
        if refused is not None:
            raise HandshakeRefused(refused)

    def _answer(self, connection: socket.socket) -> bool:
        """Serve one request; False when the client has gone."""
        connection.settimeout(None)
        head = bytearray(REQUEST_HEAD.size)
        if not _receive(connection, head):
            return False
        body = bytearray(body_bytes(head, len(self._held.tables.tables)))
        connection.settimeout(SEND_S)
        if not _receive(connection, body):
            return False
        number, rows_by_layer = requested(head, body)
        try:
            self._held.check(rows_by_layer)
        except WireError as error:
            connection.sendall(refusal(number, str(error)))
            raise
        checksum, pending = 0, answer_head(number, self._held.answer_bytes(rows_by_layer))
        for block in self._held.blocks(rows_by_layer):
            checksum = zlib.crc32(block.data, checksum)
            if len(pending) + block.nbytes <= TOGETHER_BYTES:
                pending += block.tobytes()
                continue
            connection.sendall(pending)
            connection.sendall(block.data)
            pending = b""
        connection.sendall(pending + CHECKSUM.pack(checksum))
        with self._lock:
            self._rows_sent += sum(map(len, rows_by_layer))
        return True


def _receive(connection: socket.socket, room: bytearray) -> bool:
    """Fill it; False at an end-of-file."""
    missing = memoryview(room)
    while missing:
        received = connection.recv_into(missing)
        if not received:
            return False
        missing = missing[received:]
    return True
