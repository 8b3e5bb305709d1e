"""Gloo: CPU tensors over TCP, bound to one address.

One ProcessGroupGloo per shard, never the default group. Pairs connect on first use (`lazy_init`), so that groups,
which never talk to each other, hold no connection to each other.
Traps, each of which cost a hang:
- `ProcessGroupGloo.abort` does not end a wait in progress. A wait that runs out of time does: Gloo then closes all of
  the group's connections, which is the only way to cut them (`_cut`).
- A connection is closed otherwise only when the last reference to the group *and to its works* is gone. So references
  live in as few places as possible, and no exception that leaves this module has a frame with one in its traceback.
- A work may not be dropped while its message is still to come: Gloo's event loop then finds no buffer for the arriving
  bytes, never gets idle, and the group's destructor waits for it for ever. So works are finished or cut, then dropped.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from time import monotonic
from typing import Any

import torch
from torch.distributed import ProcessGroupGloo, Store  # type: ignore[attr-defined]

from moeray.transport.communicator import Last, LinkBroken, Message, WaitOrder
from moeray.transport.errors import no_answer

FOREVER = timedelta(days=3650)
AT_ONCE = timedelta(milliseconds=1)  # Gloo's smallest; zero would mean the group's own timeout
TAG = 0

Works = list[tuple[int, Any]]
"""(peer, torch Work), in the order in which they are waited for."""


class GlooFlight:
    """See `Flight`."""

    def __init__(self, works: Works, num_receives: int, order: WaitOrder) -> None:
        self._works, self._num_receives, self._order = works, num_receives, order

    def wait(self, timeout_s: float | None) -> Last:
        now = monotonic()
        deadline = None if timeout_s is None else now + timeout_s
        broken: tuple[int, str] | None = None
        waits: list[Last] = []
        for peer, work in self._works:
            left = FOREVER if deadline is None else max(AT_ONCE, timedelta(seconds=deadline - now))
            broken = _finish(peer, work, left, timeout_s)
            if broken is not None:
                break
            before, now = now, monotonic()
            waits.append(Last(peer, now - before))
        if broken is not None:
            _cut(self._works)
        self._works = []
        if broken is not None:
            raise LinkBroken(*broken)
        return self._order.finished(waits[: self._num_receives])

    def abandon(self) -> None:
        _cut(self._works)
        self._works = []


def _finish(peer: int, work: Any, timeout: timedelta, timeout_s: float | None) -> tuple[int, str] | None:
    try:
        work.wait(timeout)
    except RuntimeError as error:
        return peer, _reason(str(error), timeout_s)
    return None


def _cut(works: Works) -> None:
    """Leave no message to come: each is here already, or every connection of the group is closed."""
    for peer, work in works:
        _finish(peer, work, AT_ONCE, None)


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
        self._order = WaitOrder()

    def exchange(self, sends: Sequence[Message], receives: Sequence[Message]) -> GlooFlight:
        works: Works = []
        broken: tuple[int, str] | None = None
        peer = -1
        try:
            # Receives first: a posted receive spares the sender a round trip.
            for tensor, peer in sorted(receives, key=lambda message: message[1] == self._order.last):
                works.append((peer, self._group.recv([tensor], peer, TAG)))
            for tensor, peer in sends:
                works.append((peer, self._group.send([tensor], peer, TAG)))
        except RuntimeError as error:
            broken = peer, _reason(str(error), None)
        if broken is not None:
            _cut(works)
            works.clear()
            raise LinkBroken(*broken)
        return GlooFlight(works, len(receives), self._order)

    def close(self) -> None:
        self._group = None


def _reason(message: str, timeout_s: float | None) -> str:
    if "Timed out" in message or "timeout" in message.lower():
        return no_answer(timeout_s)
    if "closed by peer" in message or "reset by peer" in message or "Broken pipe" in message:
        return "connection closed by peer"
    return message.splitlines()[0][:160]
