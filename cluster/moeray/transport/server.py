"""A group's listener: one thread accepts, one thread serves each connected shard.

Shards come and go on their own: none waits for another, and none can take the group down.
"""

from __future__ import annotations

import logging
import socket
import ssl
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from time import monotonic, sleep

import torch

from moeray.config import ChannelUsers, ClusterTlsConfig
from moeray.mutual_tls import ClusterCertificate, hang_up
from moeray.transport.backends import build_communicator, join_store
from moeray.transport.channel import ChannelListener
from moeray.transport.errors import HandshakeRefused
from moeray.transport.handshake import Hello, ModelIdentity, Start, receive_message, send_message
from moeray.transport.interface import ExpertCompute
from moeray.transport.links import CHANNEL_BACKENDS
from moeray.transport.merging import MergedCompute
from moeray.transport.rendezvous import keep_alive, keep_alive_all, peer_has_gone
from moeray.transport.session import BufferedLink, ComputeInto, GroupLink, Session, SessionCounts, copying
from moeray.transport.spec import geometry_of
from moeray.transport.tls_streams import TlsCommunicator

HANDSHAKE_TIMEOUT_S = 5.0
MAX_CONNECT_TIMEOUT_S = 120.0
MAX_CONNECTIONS = 256

logger = logging.getLogger("moeray.transport")


@dataclass(slots=True, eq=False)
class ConnectedShard:
    """One accepted connection, from its first byte on.

    Attributes:
        name: the shard's, "" before its hello.
        address: "host:port" it dials from.
    """

    connection: socket.socket
    address: str
    name: str = ""
    generation: int = -1
    counts: SessionCounts = field(default_factory=SessionCounts)
    serving: bool = False
    thread: threading.Thread | None = None


class GroupServer:
    """Serves one expert group's computation to any number of attention shards."""

    def __init__(
        self,
        compute: ExpertCompute | MergedCompute,
        identity: ModelIdentity,
        *,
        positions: Mapping[int, int] | None = None,
        host: str = "127.0.0.1",
        port: int = 0,
        backend: str = "gloo",
        device: str = "cpu",
        channel: ChannelUsers = "same_user",
        may_poll: bool = False,
        tls: ClusterTlsConfig | None = None,
        on_failure: Callable[[int], None] = lambda _: None,
    ) -> None:
        """Keep the settings; `start` listens.

        Args:
            compute: called from several threads at once; a `MergedCompute` lets calls of several shards be one.
            positions: see `serve_generations`; None refuses every shard until that is called.
            host: the only address listened on; port 0 takes a free one.
            may_poll: no other process needs this one's cores: a single shard's next call is awaited without sleeping.
            channel: which shards of this node may use shared memory instead of the backend (gloo only).
            tls: if it is on, only shards of this cluster are spoken to, encrypted.
            on_failure: called with the layer of each call that could not be computed, by the thread that answers it.
        Raises:
            CertificateError: a file of `tls` cannot be used.
        """
        self._may_poll, self._on_failure = may_poll, on_failure
        self._compute: ComputeInto = compute if isinstance(compute, MergedCompute) else copying(compute)
        self._identity, self._backend = identity, backend
        self._positions: Mapping[int, int] = dict(positions or {})
        self._host, self._port = host, port
        self._device = torch.device(device)
        self._channel = channel if backend in CHANNEL_BACKENDS else "off"
        self._certificate = ClusterCertificate.of(tls)
        self._lock = threading.Lock()
        self._shards: list[ConnectedShard] = []
        self._listener: socket.socket | None = None

    def start(self) -> str:
        """Listen; returns "host:port".

        Raises:
            OSError: the address cannot be bound.
        """
        self._listener = socket.create_server((self._host, self._port), backlog=128)
        threading.Thread(target=self._accept, args=(self._listener,), name="moeray-accept", daemon=True).start()
        return f"{self._host}:{self._listener.getsockname()[1]}"

    @property
    def name(self) -> str:
        """For messages."""
        positions = self._positions
        return f"expert group {positions[max(positions)] if positions else '(in no generation)'}"

    def serve_generations(self, positions: Mapping[int, int]) -> None:
        """From now on, shards of other generations are refused, and calls of connected ones fail as stale.

        Args:
            positions: generation -> this group's number in its placement.
        """
        self._positions = dict(positions)

    def shards(self) -> tuple[ConnectedShard, ...]:
        """Shards being served now."""
        with self._lock:
            return tuple(shard for shard in self._shards if shard.serving)

    def _may_poll_now(self) -> bool:
        """Whether the asking shard is the only one, too: another one's computation would need the core."""
        return self._may_poll and len(self._shards) == 1

    def stop(self, timeout_s: float = 5.0) -> None:
        """Refuse new shards and cut the connected ones; a call in progress is still answered. Idempotent.

        A thread whose shard is idle ends when that shard notices (at its next call) or closes.
        """
        listener, self._listener = self._listener, None
        if listener is not None:
            # close() alone would leave the accepting thread blocked.
            listener.shutdown(socket.SHUT_RDWR)
            listener.close()
        with self._lock:
            shards = list(self._shards)
        for shard in shards:
            hang_up(shard.connection)
        deadline = monotonic() + timeout_s
        for shard in shards:
            if shard.thread is not None:
                shard.thread.join(max(0.0, deadline - monotonic()))

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
            shard = ConnectedShard(connection, f"{address[0]}:{address[1]}")
            with self._lock:
                accepted = len(self._shards) < MAX_CONNECTIONS
                if accepted:
                    self._shards.append(shard)
            if not accepted:
                connection.close()
                continue
            shard.thread = threading.Thread(target=self._run, args=(shard,), name="moeray-shard", daemon=True)
            shard.thread.start()

    def _run(self, shard: ConnectedShard) -> None:
        # OpenMP counts threads per thread: without this call, torch's operations here use as many as there are cores,
        # not what the process has set.
        torch.get_num_threads()
        try:
            reason = self._serve(shard)
            logger.info("%s: %s went away: %s", self.name, shard.name, reason)
        except HandshakeRefused as error:
            logger.warning("%s refused %s: %s", self.name, shard.address, error)
        except (OSError, RuntimeError, ValueError, KeyError, TypeError) as error:
            logger.warning("%s dropped %s %s: %s", self.name, shard.name, shard.address, error)
        finally:
            with self._lock:
                self._shards.remove(shard)
            shard.connection.close()

    def _serve(self, shard: ConnectedShard) -> str:
        listener = None if self._channel == "off" else ChannelListener(self._channel)
        try:
            hello = self._greet(shard, "" if listener is None else listener.name)
            session = self._join(shard, hello, listener)
        finally:
            if listener is not None:
                listener.close()
        shard.counts, shard.serving = session.counts, True
        logger.info("%s serves %s (%s), generation %d", self.name, shard.name, shard.address, hello.generation)
        return session.serve()

    def _greet(self, shard: ConnectedShard, channel: str) -> Hello:
        keep_alive(shard.connection)
        deadline = monotonic() + HANDSHAKE_TIMEOUT_S
        if isinstance(shard.connection, ssl.SSLSocket):
            shard.connection.settimeout(HANDSHAKE_TIMEOUT_S)
            shard.connection.do_handshake()
        refused: str | None = None
        theirs: Hello | None = None
        ours = self._hello(channel, None)
        try:
            theirs = Hello.from_json(receive_message(shard.connection, deadline))
            ours = self._hello(channel, theirs.generation)
            refused = ours.disagreement(theirs)
        except HandshakeRefused as error:
            refused = str(error)
        send_message(shard.connection, {**ours.to_json(), "refused": refused}, deadline)
        if refused is not None or theirs is None:
            raise HandshakeRefused(refused)
        shard.name, shard.generation = theirs.sender, theirs.generation
        return theirs

    def _hello(self, channel: str, wanted: int | None) -> Hello:
        """To a shard of the wanted generation: as of that one if it is served, else of the newest."""
        positions = self._positions
        generation = wanted if wanted is not None and wanted in positions else max(positions, default=0)
        return Hello(
            sender=self.name, backend=self._backend, group=positions.get(generation, 0), generation=generation,
            inline_rows=1, max_tokens=1, identity=self._identity, channel=channel,
        )  # fmt: skip

    def _join(self, shard: ConnectedShard, theirs: Hello, listener: ChannelListener | None) -> Session:
        # The shard greets its other groups first, so this may take as long as its connecting does.
        start = Start.from_json(receive_message(shard.connection, monotonic() + MAX_CONNECT_TIMEOUT_S))
        geometry = geometry_of(theirs.identity, theirs.dispatch_format, theirs.inline_rows)
        timeout_s = min(start.connect_timeout_s, MAX_CONNECT_TIMEOUT_S)
        tls = shard.connection if isinstance(shard.connection, ssl.SSLSocket) else None
        link: GroupLink | None = None
        if start.by_channel:
            if listener is None:
                raise HandshakeRefused("it comes by a channel that was not offered")
            link = listener.accept(start.token, timeout_s, self._may_poll_now)
        elif start.by_this_connection is not (tls is not None):
            raise HandshakeRefused("rows between nodes go by the connection of the handshake if that is encrypted")
        elif tls is None:
            communicator = build_communicator(
                theirs.backend,
                join_store(start.store, timeout_s),
                rank=start.rank,
                size=start.size,
                host=self._host,
                device=self._device,
                connect_timeout_s=timeout_s,
                peer_gone=_rank_if_gone(shard.connection),
            )
            host = shard.connection.getpeername()[0]
            link = BufferedLink(communicator, geometry, theirs.max_tokens, lambda: keep_alive_all(host))
            del communicator
        send_message(shard.connection, {"ready": True}, monotonic() + HANDSHAKE_TIMEOUT_S)
        if link is None:
            assert tls is not None
            link = BufferedLink(TlsCommunicator({0: tls}), geometry, theirs.max_tokens)
        return Session(link, geometry, self._compute, lambda: self._positions, self._on_failure)


def _rank_if_gone(connection: socket.socket) -> Callable[[], int | None]:
    return lambda: 0 if peer_has_gone(connection) else None
