"""Builds the two ends of one shard's communicator.

The store, through which the ends find each other, lives in the shard's process on a port of the shard's own address,
and ends with it.
"""

from __future__ import annotations

import socket
from collections.abc import Callable
from datetime import timedelta

import torch
from torch.distributed import Store, TCPStore  # type: ignore[attr-defined]

from moeray.transport.communicator import Communicator
from moeray.transport.gloo import GlooCommunicator

BACKENDS = ("gloo", "nccl")


def host_store(host: str, timeout_s: float) -> tuple[Store, str]:
    """Open the store for one shard's communicator.

    Returns:
        The store's server end, and "host:port" for the groups. It ends when the last reference to it does.
    """
    listener = socket.create_server((host, 0), backlog=64)
    port = listener.getsockname()[1]
    # TCPStore itself would listen on every address of the machine; it takes over the descriptor.
    store = TCPStore(
        host,
        port,
        is_master=True,
        timeout=timedelta(seconds=timeout_s),
        wait_for_workers=False,
        master_listen_fd=listener.detach(),
    )
    return store, f"{host}:{port}"


def join_store(address: str, timeout_s: float) -> Store:
    """Reach a shard's store.

    Raises:
        RuntimeError: the shard's store cannot be reached in time.
    """
    host, _, port = address.rpartition(":")
    return TCPStore(host, int(port), is_master=False, timeout=timedelta(seconds=timeout_s), wait_for_workers=False)


def build_communicator(
    backend: str,
    store: Store,
    *,
    rank: int,
    size: int,
    host: str,
    device: torch.device,
    connect_timeout_s: float,
    peer_gone: Callable[[], int | None],
) -> Communicator:
    """Build this end of the communicator.

    Args:
        rank: 0 for the shard, 1 + group for a group; size: 1 + number of groups.
        peer_gone: rank of a peer whose rendezvous connection has ended; does not block.
    Raises:
        RuntimeError: the backend cannot be built (address in use, store gone, no such device).
        ValueError: an unknown backend.
    """
    if backend == "gloo":
        return GlooCommunicator(store, rank, size, host, connect_timeout_s)
    if backend == "nccl":
        from moeray.transport.nccl import NcclCommunicator  # torch's CPU build has no NCCL

        return NcclCommunicator(store, rank, size, device, connect_timeout_s, peer_gone)
    raise ValueError(f"transport backend {backend!r} is none of {', '.join(BACKENDS)}")
