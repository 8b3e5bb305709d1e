"""The shard's plain TCP connections to its groups: dialled for the handshake, kept as notices of death."""

from __future__ import annotations

import select
import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from time import monotonic

from moeray.transport.errors import HandshakeRefused, PeerLost, TransportError
from moeray.transport.handshake import Hello, Start, receive_message, send_message

EVENTS = select.POLLIN | select.POLLRDHUP


class ShardRendezvous:
    """One open connection per group, in group order.

    Attributes:
        channels: where each group waits for shards of its own node; "" for nowhere.
    """

    def __init__(self, connections: Sequence[socket.socket], channels: Sequence[str]) -> None:
        self._connections = list(connections)
        self.channels = tuple(channels)
        self._poll = select.poll()
        for connection in self._connections:
            self._poll.register(connection, EVENTS)
        self._group_of = {connection.fileno(): group for group, connection in enumerate(self._connections)}

    @classmethod
    def dial(cls, addresses: Sequence[str], hello: Hello, host: str, timeout_s: float) -> ShardRendezvous:
        """Say hello to every group.

        Args:
            addresses: "host:port" per group, in group order.
            hello: of the shard; its `group` is set for each.
            host: local address to dial from.
        Raises:
            PeerLost: a group cannot be reached or does not answer in time.
            HandshakeRefused: either side found that they do not belong together.
        """
        deadline = monotonic() + timeout_s
        connections: list[socket.socket] = []
        channels: list[str] = []
        failure: TransportError | None = None
        for group, address in enumerate(addresses):
            try:
                connections.append(_dial(address, host, deadline))
                channels.append(_greet(connections[-1], replace(hello, group=group), deadline))
            except HandshakeRefused as error:
                failure = HandshakeRefused(f"expert group {group} at {address}: {error}")
            except (OSError, ValueError) as error:
                failure = PeerLost(group, f"no handshake with {address}: {error}")
            if failure is not None:
                for connection in connections:
                    connection.close()
                raise failure
        return cls(connections, channels)

    def start(self, starts: Sequence[Start]) -> None:
        """Tell every group how to build its end of the link, and wait until all did.

        Args:
            starts: in group order.
        Raises:
            PeerLost: a group went away or was not ready in time.
        """
        deadline = monotonic() + starts[0].connect_timeout_s
        for group, start in enumerate(starts):
            with _link_of(group):
                send_message(self._connections[group], start.to_json(), deadline)
        for group in range(len(starts)):
            with _link_of(group):
                receive_message(self._connections[group], deadline)

    def gone_group(self) -> int | None:
        """A group whose connection has ended; does not block (about 1 us). None after `close`."""
        if not self._connections:
            return None
        # Groups say nothing after the handshake: whatever can be read is an end-of-file.
        return next((self._group_of[descriptor] for descriptor, _ in self._poll.poll(0)), None)

    def close(self) -> None:
        while self._connections:
            connection = self._connections.pop()
            self._poll.unregister(connection)
            connection.close()


@contextmanager
def _link_of(group: int) -> Iterator[None]:
    try:
        yield
    except (OSError, HandshakeRefused) as error:
        raise PeerLost(group, f"did not build its end of the link: {error}") from None


def _dial(address: str, host: str, deadline: float) -> socket.socket:
    name, _, port = address.rpartition(":")
    remaining_s = max(0.001, deadline - monotonic())
    connection = socket.create_connection((name, int(port)), remaining_s, source_address=(host, 0))
    keep_alive(connection)
    return connection


def _greet(connection: socket.socket, hello: Hello, deadline: float) -> str:
    """The group's channel."""
    send_message(connection, hello.to_json(), deadline)
    answer = receive_message(connection, deadline)
    theirs = Hello.from_json(answer)
    wrong = hello.disagreement(theirs)
    if wrong is not None or answer.get("refused"):
        raise HandshakeRefused(wrong or str(answer["refused"])[:400])
    return theirs.channel


def keep_alive(connection: socket.socket) -> None:
    """Notice a peer whose machine vanished within about 20 s (a dead process is noticed at once)."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 5)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 5)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 3)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)


def peer_has_gone(connection: socket.socket) -> bool:
    """Whether a silent connection has ended; does not block."""
    poll = select.poll()
    poll.register(connection, EVENTS)
    return bool(poll.poll(0))
