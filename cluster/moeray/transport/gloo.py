"""Gloo: CPU tensors over TCP, bound to one address.

One ProcessGroupGloo per shard, never the default group. Pairs connect on first use (`lazy_init`), so that groups,
which never talk to each other, hold no connection to each other.
Traps: `ProcessGroupGloo.abort` does not end a wait in progress, and a connection is closed only when the last
reference to the group *and to its works* is gone. So references live in as few places as possible and no exception
that leaves this module has a frame with one of them in its traceback.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from time import monotonic
from typing import Any

import torch
from torch.distributed import ProcessGroupGloo, Store  # type: ignore[attr-defined]

from moeray.transport.communicator import LinkBroken, Message

FOREVER = timedelta(days=3650)
TAG = 0


class GlooFlight:
    """Works in the order in which they are waited for."""

    def __init__(self, works: list[tuple[int, Any]]) -> None:
        self._works = works

    def wait(self, timeout_s: float | None) -> None:
        deadline = None if timeout_s is None else monotonic() + timeout_s
        broken: tuple[int, str] | None = None
        peer, work = -1, None
        for peer, work in self._works:
            try:
                # Zero would mean the group's default: the rest of the time is at least a millisecond.
                work.wait(FOREVER if deadline is None else timedelta(seconds=max(0.001, deadline - monotonic())))
            except RuntimeError as error:
                broken = peer, _reason(str(error), timeout_s)
                break
        self._works = []
        del peer, work
        if broken is not None:
            raise LinkBroken(*broken)


class GlooCommunicator:
    """See `Communicator`."""

    bucketed = False
    device = torch.device("cpu")

    def __init__(self, store: Store, rank: int, size: int, host: str, connect_timeout_s: float) -> None:
        """Join; nothing is sent yet.

        Args:
            host: the only address that this end listens on.
            connect_timeout_s: for the first message to each peer.
        Raises:
            RuntimeError: the address cannot be bound or the store is gone.
        """
        options = ProcessGroupGloo._Options()  # type: ignore[attr-defined]
        options._devices = [ProcessGroupGloo.create_device(hostname=host, lazy_init=True)]
        options._timeout = timedelta(seconds=connect_timeout_s)
        options._threads = 1  # runs collectives only, of which there are none
        self._group: Any = ProcessGroupGloo(store, rank, size, options)

    def exchange(self, sends: Sequence[Message], receives: Sequence[Message]) -> GlooFlight:
        works: list[tuple[int, Any]] = []
        broken: tuple[int, str] | None = None
        peer = -1
        try:
            # Receives first: a posted receive spares the sender a round trip.
            for tensor, peer in receives:
                works.append((peer, self._group.recv([tensor], peer, TAG)))
            for tensor, peer in sends:
                works.append((peer, self._group.send([tensor], peer, TAG)))
        except RuntimeError as error:
            broken = peer, _reason(str(error), None)
        if broken is not None:
            works.clear()
            raise LinkBroken(*broken)
        return GlooFlight(works)

    def close(self) -> None:
        self._group = None


def _reason(message: str, timeout_s: float | None) -> str:
    if "Timed out" in message or "timeout" in message.lower():
        return "no answer in time" if timeout_s is None else f"no answer within {timeout_s:g} s"
    if "closed by peer" in message or "reset by peer" in message or "Broken pipe" in message:
        return "connection closed by peer"
    return message.splitlines()[0][:160]
