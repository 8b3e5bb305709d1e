"""The shard's links to its groups: by channel to those of its node, by the backend to the others."""

from __future__ import annotations

import secrets
import socket
from dataclasses import dataclass

import torch
from torch import Tensor

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
from moeray.transport.wire import Geometry

CHANNEL_BACKENDS = ("gloo",)
"""Backends whose messages lie in host memory: NCCL finds the fastest way between two devices of a node by itself."""


@dataclass(slots=True)
class Links:
    """What a transport sends by, and where its messages must lie.

    Attributes:
        names: per group, "channel" or the backend.
    """

    communicator: Communicator
    memory: MessageMemory
    names: tuple[str, ...]


def build_links(
    rendezvous: ShardRendezvous,
    num_groups: int,
    geometry: Geometry,
    *,
    backend: str,
    users: ChannelUsers,
    host: str,
    device: torch.device,
    max_tokens: int,
    connect_timeout_s: float,
    spin_s: float,
    reserved: Tensor | None,
) -> tuple[Links | None, TransportError | None]:
    """Connect to every group that `rendezvous` has greeted.

    The error comes back as a value: a traceback would keep connections, and with them the groups, waiting.
    """
    channels: dict[int, socket.socket] = {}
    arena: Arena | None = None
    token = secrets.token_hex(16)
    try:
        if backend in CHANNEL_BACKENDS:
            channels = _channels(rendezvous.channels, users)
        if channels:
            arena = Arena.create(room_for(geometry, max_tokens, num_groups))
            for group, connection in channels.items():
                _share(group, connection, arena, token)
        remote = [group for group in range(num_groups) if group not in channels]
        store, address = host_store(host, connect_timeout_s) if remote else (None, "")
        rendezvous.start(
            [
                Start(
                    rank=0 if group in channels else 1 + remote.index(group),
                    size=1 + len(remote),
                    store="" if group in channels else address,
                    connect_timeout_s=connect_timeout_s,
                    token=token if group in channels else "",
                )
                for group in range(num_groups)
            ]
        )
        parts: list[tuple[Communicator, list[int]]] = []
        if arena is not None:
            by_rank = {1 + own: connection for own, connection in enumerate(channels.values())}
            parts.append((Channels(by_rank, arena, spin_s), [0, *(1 + group for group in channels)]))
        if store is not None:

            def peer_gone() -> int | None:
                group = rendezvous.gone_group()
                return None if group is None or group not in remote else 1 + remote.index(group)

            part = build_communicator(
                backend,
                store,
                rank=0,
                size=1 + len(remote),
                host=host,
                device=device,
                connect_timeout_s=connect_timeout_s,
                peer_gone=peer_gone,
            )
            parts.append((part, [0, *(1 + group for group in remote)]))
            del part
    except TransportError as error:
        return None, _given_up(channels, arena, error.with_traceback(None))
    except (OSError, RuntimeError, ValueError, ImportError) as error:
        reason = TransportError(f"cannot build the {backend} communicator on {host}: {error}")
        return None, _given_up(channels, arena, reason)
    names = tuple("channel" if group in channels else backend for group in range(num_groups))
    communicator = parts[0][0] if len(parts) == 1 else MixedCommunicator(parts)
    private = PrivateMemory(device) if reserved is None else ReservedMemory(reserved)
    return Links(communicator, arena or private, names), None


def room_for(geometry: Geometry, max_tokens: int, num_groups: int) -> int:
    """Bytes of all messages of one dispatch and its replies."""
    blocks = aligned(num_groups * geometry.block_bytes)
    payloads = aligned(geometry.payload_room(max_tokens, num_groups))
    return blocks + payloads + aligned(geometry.reply_room(max_tokens, num_groups) * geometry.row_bytes)


def _channels(names: tuple[str, ...], users: ChannelUsers) -> dict[int, socket.socket]:
    found = {group: open_channel(name, users) for group, name in enumerate(names)}
    return {group: connection for group, connection in found.items() if connection is not None}


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
