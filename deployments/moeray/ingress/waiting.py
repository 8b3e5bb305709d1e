"""Accepted requests that no shard runs now: in the order of their loss, each for a limited time."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator

from moeray.ingress.in_flight import InFlight


class Waiting:
    """Requests that wait for a shard. Single event loop.

    Args:
        wait_s: how long each waits; then `give_up` is called with it.
    """

    def __init__(self, wait_s: float, give_up: Callable[[InFlight], None]) -> None:
        self.wait_s = wait_s
        self._give_up = give_up
        self._requests: dict[str, tuple[InFlight, asyncio.TimerHandle]] = {}

    def __iter__(self) -> Iterator[InFlight]:
        """Those that wait now, the longest first; they may be discarded meanwhile."""
        return iter([known for known, _ in self._requests.values()])

    def __len__(self) -> int:
        return len(self._requests)

    def add(self, known: InFlight) -> None:
        """One that waits already keeps its place and its time."""
        if known.request_id not in self._requests:
            timer = asyncio.get_running_loop().call_later(self.wait_s, self._give_up, known)
            self._requests[known.request_id] = known, timer

    def discard(self, known: InFlight) -> None:
        if (entry := self._requests.pop(known.request_id, None)) is not None:
            entry[1].cancel()
