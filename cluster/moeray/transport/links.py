"""The shard's links to its groups: by channel to those of its node, by the backend to the others."""

from __future__ import annotations

import secrets
import socket
from dataclasses import dataclass

import torch
from torch.distributed import Store  # type: ignore[attr-defined]

from moeray.config import ChannelUsers
from moeray.transport.arena import Arena
from moeray.transport.backends import build_communicator, host_store
from moeray.transport.channel import Channels, open_channel, share_arena
from moeray.transport.communicator import Communicator
from moeray.transport.errors import PeerLost, TransportError
from moeray.transport.handshake import Start
from moeray.transport.memory import MessageMemory, PrivateMemory, ReservedMemory, aligned
from moeray.transport.mixed import MixedCommunicator
from moeray.transport.rendezvous import ShardRendezvous
from moeray.transport.spec import TransportSpec
from moeray.transport.tls_streams import TlsCommunicator
from moeray.transport.wire import Geometry

CHANNEL_BACKENDS = ("gloo",)
"""Backends whose messages lie in host memory: NCCL finds the fastest way between two devices of a node by itself."""


@dataclass(slots=True)
class Links:
    """What a transport sends by, and where its messages must lie.

    Attributes:
        names: per group, "channel", "tls" or the backend.
    """

    communicator: Communicator
    memory: MessageMemory
    names: tuple[str, ...]


def build_links(spec: TransportSpec, rendezvous: ShardRendezvous) -> tuple[Links | None, TransportError | None]:
    """Connect to every group that `rendezvous` has greeted.

    The error comes back as a value: a traceback would keep connections, and with them the groups, waiting.
    """
    num_groups = len(rendezvous.groups)
    channels: dict[int, socket.socket] = {}
    arena: Arena | None = None
    token = secrets.token_hex(16)
    try:
        if spec.backend in CHANNEL_BACKENDS:
            channels = _channels(rendezvous.channels, spec.channel)
        if channels:
            arena = Arena.create(room_for(spec.geometry, spec.max_tokens, num_groups))
            for index, connection in channels.items():
                _share(rendezvous.groups[index], connection, arena, token)
        remote = [index for index in range(num_groups) if index not in channels]
        by_store = remote and not spec.tls.is_on
        store, address = host_store(spec.host, spec.connect_timeout_s) if by_store else (None, "")
        rendezvous.start(_starts(num_groups, remote, address, token, spec.connect_timeout_s))
        parts: list[tuple[Communicator, list[int]]] = []
        if arena is not None:
            by_rank = {1 + own: connection for own, connection in enumerate(channels.values())}
            parts.append((Channels(by_rank, arena, spec.spin_s), [0, *(1 + index for index in channels)]))
        if remote:
            part = _tls_part(rendezvous, remote) if store is None else _remote_part(spec, rendezvous, remote, store)
            parts.append((part, [0, *(1 + index for index in remote)]))
    except TransportError as error:
        return None, _given_up(channels, arena, error.with_traceback(None))
    except (OSError, RuntimeError, ValueError, ImportError) as error:
        reason = TransportError(f"cannot build the {spec.backend} communicator on {spec.host}: {error}")
        return None, _given_up(channels, arena, reason)
    name = "tls" if spec.tls.is_on else spec.backend
    names = tuple("channel" if index in channels else name for index in range(num_groups))
    communicator = parts[0][0] if len(parts) == 1 else MixedCommunicator(parts)
    private = PrivateMemory(torch.device(spec.device)) if spec.reserved is None else ReservedMemory(spec.reserved)
    return Links(communicator, arena or private, names), None


def _starts(num_groups: int, remote: list[int], store: str, token: str, connect_timeout_s: float) -> list[Start]:
    """What each group is told, in order."""
    return [
        Start(
            rank=1 + remote.index(index) if index in remote else 0,
            size=1 + len(remote),
            store=store if index in remote else "",
            connect_timeout_s=connect_timeout_s,
            token="" if index in remote else token,
        )
        for index in range(num_groups)
    ]


def _remote_part(spec: TransportSpec, rendezvous: ShardRendezvous, remote: list[int], store: Store) -> Communicator:
    """The backend's communicator with the groups that no channel reaches."""

    def peer_gone() -> int | None:
        index = rendezvous.gone()
        return None if index is None or index not in remote else 1 + remote.index(index)

    return build_communicator(
        spec.backend,
        store,
        rank=0,
        size=1 + len(remote),
        host=spec.host,
        device=torch.device(spec.device),
        connect_timeout_s=spec.connect_timeout_s,
        peer_gone=peer_gone,
    )


def _tls_part(rendezvous: ShardRendezvous, remote: list[int]) -> Communicator:
    """With the groups that no channel reaches, where the connections are encrypted."""
    return TlsCommunicator({1 + own: rendezvous.hand_over(index) for own, index in enumerate(remote)})


def room_for(geometry: Geometry, max_tokens: int, num_groups: int) -> int:
    """Bytes of all messages of one dispatch and its replies."""
    blocks = aligned(num_groups * geometry.block_bytes)
    payloads = aligned(geometry.payload_room(max_tokens, num_groups))
    return blocks + payloads + aligned(geometry.reply_room(max_tokens, num_groups) * geometry.row_bytes)


def _channels(names: tuple[str, ...], users: ChannelUsers) -> dict[int, socket.socket]:
    found = {index: open_channel(name, users) for index, name in enumerate(names)}
    return {index: connection for index, connection in found.items() if connection is not None}


def _share(group: int, connection: socket.socket, arena: Arena, token: str) -> None:
    try:
        share_arena(connection, arena, token)
    except OSError as error:
        raise PeerLost(group, f"did not take the shared memory: {error}") from None


def _given_up(channels: dict[int, socket.socket], arena: Arena | None, error: TransportError) -> TransportError:
    for connection in channels.values():
        connection.close()
    if arena is not None:
        arena.close()
    return error
