"""The shard's connections to its groups: dialled for the handshake, kept as notices of death."""

from __future__ import annotations

import os
import select
import socket
import ssl
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from time import monotonic

from moeray.mutual_tls import CertificateError, ClusterCertificate
from moeray.transport.errors import HandshakeRefused, PeerLost, TransportError
from moeray.transport.handshake import Hello, Start, receive_message, send_message

EVENTS = select.POLLIN | select.POLLRDHUP


class ShardRendezvous:
    """One open connection per group that is there, in ascending order.

    What belongs to the n-th of them has index n everywhere in a transport; only errors speak of group numbers.

    Attributes:
        groups: their numbers in the placement.
        channels: where each waits for shards of its own node; "" for nowhere.
    """

    def __init__(self, groups: Sequence[int], connections: Sequence[socket.socket], channels: Sequence[str]) -> None:
        self.groups = tuple(groups)
        self._connections = list(connections)
        self.channels = tuple(channels)
        self._poll = select.poll()
        for connection in self._connections:
            self._poll.register(connection, EVENTS)
        self._index_of = {connection.fileno(): index for index, connection in enumerate(self._connections)}

    @classmethod
    def dial(
        cls,
        addresses: Mapping[int, str],
        hello: Hello,
        host: str,
        timeout_s: float,
        certificate: ClusterCertificate | None = None,
    ) -> ShardRendezvous:
        """Say hello to every group.

        Args:
            addresses: group number -> "host:port", ascending.
            hello: of the shard; its `group` is set for each.
            host: local address to dial from.
            certificate: with it, TLS.
        Raises:
            PeerLost: a group cannot be reached or does not answer in time.
            HandshakeRefused: either side found that they do not belong together.
        """
        deadline = monotonic() + timeout_s
        connections: list[socket.socket] = []
        channels: list[str] = []
        failure: TransportError | None = None
        for group, address in addresses.items():
            try:
                connections.append(_dial(address, host, deadline, certificate))
                channels.append(_greet(connections[-1], replace(hello, group=group), deadline))
            except HandshakeRefused as error:
                failure = HandshakeRefused(f"expert group {group} at {address}: {error}")
            except (OSError, ValueError, CertificateError) as error:
                failure = PeerLost(group, f"no handshake with {address}: {error}")
            if failure is not None:
                for connection in connections:
                    connection.close()
                raise failure
        return cls(list(addresses), connections, channels)

    def start(self, starts: Sequence[Start]) -> None:
        """Tell every group how to build its end of the link, and wait until all did.

        Args:
            starts: in the groups' order.
        Raises:
            PeerLost: a group went away or was not ready in time.
        """
        deadline = monotonic() + starts[0].connect_timeout_s
        for group, connection, start in zip(self.groups, self._connections, starts, strict=True):
            with _link_of(group):
                send_message(connection, start.to_json(), deadline)
        for group, connection in zip(self.groups, self._connections, strict=True):
            with _link_of(group):
                receive_message(connection, deadline)

    def hand_over(self, index: int) -> ssl.SSLSocket:
        """The connection with a group, to carry rows from now on; `gone` watches it no more."""
        connection = self._connections[index]
        assert isinstance(connection, ssl.SSLSocket)
        self._poll.unregister(connection)
        return connection

    def gone(self) -> int | None:
        """Index of a group whose connection has ended; does not block (about 1 us). None after `close`."""
        if not self._connections:
            return None
        # Groups say nothing after the handshake: whatever can be read is an end-of-file.
        return next((self._index_of[descriptor] for descriptor, _ in self._poll.poll(0)), None)

    def close(self) -> None:
        while self._connections:
            connection = self._connections.pop()
            with suppress(KeyError, ValueError):  # handed over, or closed by whom it was handed over to
                self._poll.unregister(connection)
            connection.close()


@contextmanager
def _link_of(group: int) -> Iterator[None]:
    try:
        yield
    except (OSError, HandshakeRefused) as error:
        raise PeerLost(group, f"did not build its end of the link: {error}") from None


def _dial(address: str, host: str, deadline: float, certificate: ClusterCertificate | None) -> socket.socket:
    name, _, port = address.rpartition(":")
    remaining_s = max(0.001, deadline - monotonic())
    connection = socket.create_connection((name, int(port)), remaining_s, source_address=(host, 0))
    keep_alive(connection)
    return connection if certificate is None else certificate.dialled(connection)


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
    # What was sent and never acknowledged keeps the probes away and is repeated for a quarter of an hour.
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 20_000)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)


def keep_alive_all(host: str) -> None:
    """`keep_alive` for every TCP connection of this process to that address.

    Gloo does not let its own be found. Without this, a group whose shard's machine vanished would keep its session,
    which waits for the shard's next call without a limit, until the kernel gives the connection up: never, if idle.
    """
    for each in Path("/proc/self/fd").iterdir():
        with suppress(OSError):  # closed meanwhile, or not connected
            if not each.readlink().name.startswith("socket:"):
                continue
            with socket.socket(fileno=os.dup(int(each.name))) as connection:
                is_tcp = connection.family in (socket.AF_INET, socket.AF_INET6)
                if is_tcp and connection.type is socket.SOCK_STREAM and connection.getpeername()[0] == host:
                    keep_alive(connection)


def peer_has_gone(connection: socket.socket) -> bool:
    """Whether a silent connection has ended; does not block."""
    poll = select.poll()
    poll.register(connection, EVENTS)
    return bool(poll.poll(0))
