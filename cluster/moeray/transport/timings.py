"""What a shard's layer calls cost, counted in the hot path by additions only.

What they come to is measured in docs/performance.md.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from time import perf_counter_ns


@dataclass(slots=True)
class HopTimings:
    """Sums over layer calls since the transport was connected.

    Attributes:
        calls: layer calls combined without error.
        tokens: tokens dispatched (T), before they are spread over groups.
        pack_ns: choosing and copying rows.
        send_ns: handing the messages to the backend.
        overlap_ns: between dispatch and combine (the shared expert).
        wait_ns: in combine, until the last group's rows were there.
        reduce_ns: weighting and adding the rows.
        pairs_per_group: (token, expert) pairs sent to each group; empty where the backend keeps sizes on the device.
    """

    calls: int = 0
    tokens: int = 0
    pack_ns: int = 0
    send_ns: int = 0
    overlap_ns: int = 0
    wait_ns: int = 0
    reduce_ns: int = 0
    pairs_per_group: list[int] = field(default_factory=list)

    def per_layer_us(self) -> dict[str, float]:
        """Microseconds per layer call: pack, exchange (send + wait), overlap, combine (reduction)."""
        calls = max(1, self.calls) * 1e3
        return {
            "pack": self.pack_ns / calls,
            "exchange": (self.send_ns + self.wait_ns) / calls,
            "overlap": self.overlap_ns / calls,
            "combine": self.reduce_ns / calls,
        }


now_ns = perf_counter_ns
