"""Suspects: requests with which shards died again and again, and that got no token from them."""

from __future__ import annotations

from moeray.ingress.in_flight import InFlight


class Suspects:
    """Which shard runs which suspect. At most one each: the next death shows which request ends shards, and takes no
    other along. A token clears it.
    """

    def __init__(self) -> None:
        self._by_shard: dict[str, InFlight] = {}

    def may_run(self, known: InFlight, shard: str) -> bool:
        """Whether this shard may get this request, suspect or not."""
        return not known.is_suspect or shard not in self._by_shard

    def start(self, known: InFlight, shard: str) -> None:
        """It runs there now."""
        if known.is_suspect:
            self._by_shard[shard] = known

    def discard(self, known: InFlight) -> bool:
        """It is cleared, or leaves its shard; whether that shard may have another suspect now."""
        if known.shard and self._by_shard.get(known.shard) is known:
            del self._by_shard[known.shard]
            return True
        return False
