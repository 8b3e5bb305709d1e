"""Groups of this node by channel, the others by a communicator between nodes, in one dispatch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from time import monotonic

import torch

from moeray.transport.communicator import NOBODY, Communicator, Flight, Last, LinkBroken, Message, WaitOrder
from moeray.transport.errors import no_answer


class MixedFlight:
    """See `Flight`: one flight of every part, waited for in order under one deadline."""

    def __init__(self, flights: Sequence[tuple[int, Flight, Sequence[int]]], order: WaitOrder) -> None:
        self._flights, self._order = list(flights), order

    def wait(self, timeout_s: float | None) -> Last:
        now = monotonic()
        deadline = None if timeout_s is None else now + timeout_s
        broken: tuple[int, str] | None = None
        waits: list[Last] = []
        last = NOBODY
        while self._flights and broken is None:
            part, flight, ranks = self._flights.pop(0)
            try:
                last = flight.wait(None if deadline is None else max(0.0, deadline - now))
                before, now = now, monotonic()
                waits.append(Last(part, now - before))
                if last.peer >= 0:
                    last = last._replace(peer=ranks[last.peer])
                elif len(ranks) == 2:  # the shard and one peer: its time is the part's
                    last = Last(ranks[1], now - before)
            except LinkBroken as error:
                late = deadline is not None and monotonic() >= deadline
                reason = no_answer(timeout_s) if late else error.reason
                broken = (ranks[error.peer] if error.peer >= 0 else -1), reason
            del flight
        if broken is not None:
            self.abandon()
            raise LinkBroken(*broken)
        return last if self._order.finished(waits).peer >= 0 else NOBODY

    def abandon(self) -> None:
        for _, flight, _ in self._flights:
            flight.abandon()
        self._flights = []


class MixedCommunicator:
    """See `Communicator`; each part knows its peers by ranks of its own."""

    bucketed = False
    device = torch.device("cpu")

    def __init__(self, parts: Sequence[tuple[Communicator, Sequence[int]]]) -> None:
        """Join the parts.

        Args:
            parts: each with [rank in the part] -> rank here; 0 is the shard itself everywhere.
        """
        self._parts = list(parts)
        self._order = WaitOrder()
        self._home: Mapping[int, tuple[int, int]] = {
            rank: (part, own) for part, (_, ranks) in enumerate(parts) for own, rank in enumerate(ranks) if rank
        }

    def exchange(self, sends: Sequence[Message], receives: Sequence[Message]) -> MixedFlight:
        flights: list[tuple[int, Flight, Sequence[int]]] = []
        broken: tuple[int, str] | None = None
        for part, (communicator, ranks) in enumerate(self._parts):
            try:
                flights.append((part, communicator.exchange(self._of(part, sends), self._of(part, receives)), ranks))
            except LinkBroken as error:
                broken = (ranks[error.peer] if error.peer >= 0 else -1), error.reason
                break
        flights.sort(key=lambda flight: flight[0] == self._order.last)
        flight = MixedFlight(flights, self._order)
        if broken is not None:
            flight.abandon()
            raise LinkBroken(*broken)
        return flight

    def close(self) -> None:
        for communicator, _ in self._parts:
            communicator.close()
        self._parts = []

    def _of(self, part: int, messages: Sequence[Message]) -> list[Message]:
        return [(tensor, self._home[rank][1]) for tensor, rank in messages if self._home[rank][0] == part]
