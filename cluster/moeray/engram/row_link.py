"""A client's connection to one row server: requests out, rows straight into the places that are theirs.

Nothing blocks here but `dial`. A link that failed once is of no more use: what it was to bring is asked of another.
"""

from __future__ import annotations

import select
import socket
import ssl
import zlib
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from time import monotonic

from moeray.engram.row_wire import ANSWER_HEAD, CHECKSUM, RowHello, WireError, refused_bytes
from moeray.mutual_tls import CertificateError, ClusterCertificate
from moeray.transport.errors import HandshakeRefused
from moeray.transport.handshake import receive_message, send_message
from moeray.transport.rendezvous import keep_alive

CLOSED = "connection closed by peer"
RECEIVE_BUFFER_BYTES = 8 << 20
"""What the kernel is asked to hold while the layers before are computed (it may give less)."""


class RowsRefused(RuntimeError):
    """A server answered that it cannot bring the rows; the text says why."""


@dataclass(slots=True, eq=False)
class Portion:
    """What one request brings.

    Attributes:
        shares: whose rows they are.
        places: where the answer's bytes go, in the order of the wire; none is empty.
        due: on the monotonic clock: then the server has had its time.
    """

    number: int
    shares: tuple[int, ...]
    places: Sequence[memoryview]
    due: float = 0.0

    @property
    def num_bytes(self) -> int:
        return sum(len(place) for place in self.places)


class RowLink:
    """See module docstring. Used by one thread at a time.

    Attributes:
        pending: portions that are not complete, the one that comes next at the front.
    """

    def __init__(self, server: int, address: str, connection: socket.socket) -> None:
        """Take over a connection whose hello is done."""
        connection.setblocking(False)
        self.server, self.address = server, address
        self._connection = connection
        self.pending: deque[Portion] = deque()
        self._out: deque[memoryview] = deque()
        self._head, self._tail = bytearray(ANSWER_HEAD.size), bytearray(CHECKSUM.size)
        self._sum = 0
        self._parts = self._answers()
        self._missing, self._summed = next(self._parts)

    @classmethod
    def dial(
        cls, address: str, hello: RowHello, host: str, timeout_s: float, certificate: ClusterCertificate | None
    ) -> RowLink:
        """Connect and say hello.

        Args:
            host: local address to dial from.
        Raises:
            OSError: nobody answers there in time.
            HandshakeRefused: it has other rows than we ask for; names what differs.
            CertificateError: a file of `cluster_tls` cannot be used.
        """
        deadline = monotonic() + timeout_s
        name, _, port = address.rpartition(":")
        connection = socket.create_connection((name, int(port)), timeout_s, source_address=(host, 0))
        try:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, RECEIVE_BUFFER_BYTES)
            keep_alive(connection)
            if certificate is not None:
                connection = certificate.dialled(connection)
            send_message(connection, hello.to_json(), deadline)
            answer = receive_message(connection, deadline)
            wrong = hello.disagreement(answer)
            if wrong is not None or answer.get("refused"):
                raise HandshakeRefused(wrong or str(answer["refused"])[:400])
        except (OSError, HandshakeRefused, CertificateError):
            connection.close()
            raise
        return cls(hello.server, address, connection)

    def fileno(self) -> int:
        return self._connection.fileno()

    def ask(self, request: bytes, portion: Portion) -> None:
        """Queue a request; `pump` sends it."""
        self._out.append(memoryview(request))
        self.pending.append(portion)

    def pump(self) -> int:
        """Send and receive what goes without waiting; what to poll for then, 0 if nothing is left.

        Raises:
            OSError: the connection has ended.
            WireError: what came is not the answer.
            RowsRefused: the server said so.
        """
        return self._push() | self._pull()

    def close(self) -> None:
        self._connection.close()

    def _push(self) -> int:
        while self._out:
            try:
                sent = self._connection.send(self._out[0])
            except (BlockingIOError, ssl.SSLWantWriteError):
                return select.POLLOUT
            except ssl.SSLWantReadError:
                return select.POLLIN
            if sent == len(self._out[0]):
                self._out.popleft()
            else:
                self._out[0] = self._out[0][sent:]
        return 0

    def _pull(self) -> int:
        while self.pending:
            try:
                received = self._connection.recv_into(self._missing)
            except (BlockingIOError, ssl.SSLWantReadError):
                return select.POLLIN
            except ssl.SSLWantWriteError:
                return select.POLLOUT
            if not received:
                raise ConnectionResetError(CLOSED)
            if self._summed:
                self._sum = zlib.crc32(self._missing[:received], self._sum)
            self._missing = self._missing[received:]
            if not self._missing:
                self._missing, self._summed = next(self._parts)
        return 0

    def _answers(self) -> Iterator[tuple[memoryview, bool]]:
        """What is to be filled next, without an end, and whether the checksum covers it."""
        while True:
            self._sum = 0
            yield memoryview(self._head), False
            portion = self.pending[0]
            length = refused_bytes(self._head, portion.number, portion.num_bytes)
            text = bytearray(length)
            for place in (memoryview(text),) if length else portion.places:
                yield place, True
            yield memoryview(self._tail), False
            if CHECKSUM.unpack(self._tail)[0] != self._sum:
                raise WireError("an answer whose checksum is wrong: it was changed on the way")
            if length:
                raise RowsRefused(text.decode(errors="replace"))
            self.pending.popleft()
