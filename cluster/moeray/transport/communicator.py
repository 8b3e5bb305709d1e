"""Point-to-point messages between one attention shard (rank 0) and its expert groups (rank 1 + group).

The hop is an all-to-all in which the blocks between groups are always empty, so they are not sent at all: each
exchange is a set of sends and receives between the shard and every group. Against the library's collective on the
same machine this saves a thread hand-over on each side (89 against 256 us at one row), lets a wait name the peer that
it waited for, and keeps one hung group from holding up the threads of the others.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

Message = tuple[Tensor, int]
"""(contiguous tensor, peer's rank); both ends know its size."""


class LinkBroken(Exception):
    """A message could not be delivered. Internal: the two ends translate it.

    Attributes:
        peer: rank, or -1 where the library cannot tell.
    """

    def __init__(self, peer: int, reason: str) -> None:
        super().__init__(f"rank {peer}: {reason}")
        self.peer = peer
        self.reason = reason


class Last(NamedTuple):
    """Who was waited for when all others had answered.

    Attributes:
        peer: rank; -1 if nobody, or where the library cannot tell.
        alone_s: how long.
    """

    peer: int = -1
    alone_s: float = 0.0


NOBODY = Last()


@dataclass(slots=True)
class WaitOrder:
    """Of a communicator that waits for one after the other: who goes last.

    Only the last one's time is its own, so whoever was waited for longest is last the next time. Shared with flights.
    """

    last: int = -1

    def finished(self, waits: Sequence[Last]) -> Last:
        """What these waits, in the order in which they ended, say of the last one."""
        longest = max(waits, key=lambda wait: wait.alone_s, default=NOBODY)
        self.last = longest.peer
        return longest if len(waits) > 1 and longest is waits[-1] else NOBODY


class Flight(Protocol):
    """Messages in flight; their tensors must stay as they are until `wait` returned."""

    def wait(self, timeout_s: float | None) -> Last:
        """Wait until all messages were sent and received.

        Args:
            timeout_s: for all messages together; None waits until the peer answers or its connection ends.
        Raises:
            LinkBroken: a peer is gone or did not answer in time; the communicator is of no more use.
        """
        ...

    def abandon(self) -> None:
        """Give up without waiting; the communicator must be closed next. Idempotent, also after `wait`."""
        ...


class Communicator(Protocol):
    """One shard's connections. Used by one thread."""

    @property
    def device(self) -> torch.device:
        """Where the messages' tensors must live."""
        ...

    @property
    def bucketed(self) -> bool:
        """Sizes must not depend on the routing, because reading it would stall the device."""
        ...

    def exchange(self, sends: Sequence[Message], receives: Sequence[Message]) -> Flight:
        """Start all of them at once.

        Raises:
            LinkBroken: a peer's connection is gone already.
        """
        ...

    def close(self) -> None:
        """Drop the connections: every peer's wait ends with LinkBroken. Flights must have ended before.

        A flight ends by a wait, with or without an error, or by being abandoned.
        """
        ...
