"""Rows between nodes over TLS: the connection of the handshake carries them, where the cluster has certificates.

Gloo as torch ships it has no TLS. Each message is its length (8 bytes, little-endian) and its bytes; both ends know
what comes next, so there is nothing else to say. One thread moves all connections of a communicator at once, none of
them blocks: a peer that does not read holds up nobody but the wait that is for it.
"""

from __future__ import annotations

import select
import ssl
import struct
from collections import deque
from collections.abc import Mapping, Sequence
from time import monotonic

import torch
from torch import Tensor

from moeray.transport.communicator import NOBODY, Last, LinkBroken, Message
from moeray.transport.errors import no_answer

LENGTH = struct.Struct("<Q")
RECORD_BYTES = 1 << 14
"""What TLS sends at once; a message that fits is one record with its length."""
CLOSED = "connection closed by peer"


class _Stream:
    """One connection, and what is still to go out and to come in."""

    def __init__(self, connection: ssl.SSLSocket) -> None:
        connection.setblocking(False)
        self._connection = connection
        self._out: deque[memoryview] = deque()
        self._in: deque[memoryview] = deque()
        self._head = bytearray(LENGTH.size)
        self._missing = memoryview(self._head)  # what is being filled: the head, then the message
        self._in_head = True

    def send(self, tensor: Tensor) -> None:
        data = _bytes_of(tensor)
        head = LENGTH.pack(len(data))
        if len(data) + len(head) <= RECORD_BYTES:
            self._out.append(memoryview(head + data))
        else:
            self._out += memoryview(head), data

    def receive(self, tensor: Tensor) -> None:
        self._in.append(_bytes_of(tensor))

    @property
    def has_received(self) -> bool:
        return not self._in

    def pump(self) -> int:
        """Send and receive what goes without waiting; what to poll for then, 0 if nothing is left.

        Raises:
            OSError: the connection has ended.
            ValueError: the message that comes is longer than its tensor.
        """
        return self._push() | self._pull()

    def _push(self) -> int:
        while self._out:
            try:
                sent = self._connection.send(self._out[0])
            except ssl.SSLWantWriteError:
                return select.POLLOUT
            except ssl.SSLWantReadError:
                return select.POLLIN
            if sent == len(self._out[0]):
                self._out.popleft()
            else:
                self._out[0] = self._out[0][sent:]
        return 0

    def _pull(self) -> int:
        while self._in:
            try:
                received = self._connection.recv_into(self._missing) if self._missing else 0
            except ssl.SSLWantReadError:
                return select.POLLIN
            except ssl.SSLWantWriteError:
                return select.POLLOUT
            if self._missing and not received:
                raise ConnectionResetError(CLOSED)
            self._missing = self._missing[received:]
            if not self._missing:
                self._next_part()
        return 0

    def _next_part(self) -> None:
        if not self._in_head:
            self._in.popleft()
            self._missing, self._in_head = memoryview(self._head), True
            return
        (length,), room = LENGTH.unpack(self._head), self._in[0]
        if length > len(room):
            raise ValueError(f"a message of {length} bytes where {len(room)} were expected")
        self._missing, self._in_head = room[:length], False


class TlsFlight:
    """See `Flight`."""

    def __init__(self, communicator: TlsCommunicator, receiving: Sequence[int]) -> None:
        self._communicator, self._receiving = communicator, receiving

    def wait(self, timeout_s: float | None) -> Last:
        return self._communicator.finish(self._receiving, timeout_s)

    def abandon(self) -> None:
        """What is under way ends with the connections."""


class TlsCommunicator:
    """See `Communicator`."""

    bucketed = False
    device = torch.device("cpu")

    def __init__(self, connections: Mapping[int, ssl.SSLSocket]) -> None:
        """Take over connections whose handshakes are done.

        Args:
            connections: by the peer's rank.
        """
        self._connections = dict(connections)
        self._streams = {rank: _Stream(connection) for rank, connection in connections.items()}
        self._poll = select.poll()
        self._wanted: dict[int, int] = {}

    def exchange(self, sends: Sequence[Message], receives: Sequence[Message]) -> TlsFlight:
        for tensor, rank in receives:
            self._streams[rank].receive(tensor)
        for tensor, rank in sends:
            self._streams[rank].send(tensor)
        self._pump({rank for _, rank in sends})
        return TlsFlight(self, [rank for _, rank in receives])

    def finish(self, receiving: Sequence[int], timeout_s: float | None) -> Last:
        """See `Flight.wait`.

        Args:
            receiving: ranks that this flight has a message of.
        """
        now = begun = monotonic()
        pending, awaited, last = set(self._streams), set(receiving), NOBODY
        while True:
            self._pump(pending)
            if arrived := {rank for rank in awaited if self._streams[rank].has_received}:
                awaited -= arrived
                before, now = now, monotonic()
                last = Last(arrived.pop(), now - before)
            if not pending:
                return last if len(receiving) > 1 else NOBODY
            left_s = None if timeout_s is None else begun + timeout_s - monotonic()
            if left_s is not None and left_s <= 0:
                raise LinkBroken(min(pending), no_answer(timeout_s))
            self._poll.poll(None if left_s is None else 1 + 1000 * left_s)

    def close(self) -> None:
        for connection in self._connections.values():
            connection.close()

    def _pump(self, ranks: set[int]) -> None:
        """Move what goes without waiting; of `ranks`, those that have nothing left are taken out."""
        for rank in tuple(ranks):
            try:
                wanted = self._streams[rank].pump()
            except (OSError, ValueError) as error:
                raise LinkBroken(rank, _reason(error)) from None
            self._watch(rank, wanted)
            if not wanted:
                ranks.discard(rank)

    def _watch(self, rank: int, wanted: int) -> None:
        if wanted != self._wanted.get(rank, 0):
            if wanted:
                self._poll.register(self._connections[rank], wanted)
            else:
                self._poll.unregister(self._connections[rank])
            self._wanted[rank] = wanted


def _bytes_of(tensor: Tensor) -> memoryview:
    return tensor.view(-1).view(torch.uint8).numpy().data


def _reason(error: Exception) -> str:
    gone = isinstance(error, (ConnectionError, ssl.SSLEOFError, ssl.SSLZeroReturnError))
    return CLOSED if gone else str(error) or type(error).__name__
