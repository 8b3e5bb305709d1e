"""What a store of KV blocks is, whatever keeps them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol


class StoreFailed(RuntimeError):
    """The store did not do its work: unreachable, refused, full or too slow. Says which, and where to look."""


@dataclass(frozen=True, slots=True)
class Usage:
    """Attributes: budget_bytes: 0 where the store has none that it knows of."""

    blocks: int
    bytes: int
    budget_bytes: int


class BlockStore(Protocol):
    """Immutable blocks of one size, named by their content: whoever stores one first has stored it for all.

    Thread-safe. Every call ends within the store's time-out, or raises StoreFailed. A block that is damaged is one that
    is not there.

    Attributes:
        name: of the kind of store: node, redis.
        where: directory or address, without secrets.
        namespace: blocks of other namespaces are of other models or versions.
    """

    name: str
    where: str
    namespace: str

    def has(self, names: Sequence[bytes]) -> list[bool]:
        """Which of these are there."""

    def load(self, names: Sequence[bytes]) -> Iterator[memoryview | bytes | None]:
        """The blocks in order, as they come; None: not there, or not what was stored (then it is deleted, too)."""

    def store(self, names: Sequence[bytes], blocks: Sequence[memoryview]) -> int:
        """Keep what is not there yet; returns how many were new. For want of room, what was not used longest goes."""

    def touch(self, names: Sequence[bytes]) -> None:
        """They were used: they go later."""

    def usage(self) -> Usage:
        """Of this namespace; the budget is that of all."""

    def flush(self) -> int:
        """Delete every block of this namespace; returns how many there were."""

    def close(self) -> None:
        """Idempotent."""
