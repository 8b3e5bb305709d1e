"""What the hop's layer calls and their failures cost."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(slots=True)
class HopCosts:
    """Sums since the hop was set up; times in microseconds.

    Attributes:
        calls: layer calls combined.
        tokens: tokens sent, summed over layer calls.
        overlap_us: between dispatch and combine: the shared expert.
        failures: layer calls that failed and were computed again.
        stalled_us: what that cost, waiting for experts included.
        longest_stall_us: of one layer call.
    """

    calls: int = 0
    tokens: int = 0
    dispatch_us: float = 0.0
    overlap_us: float = 0.0
    combine_us: float = 0.0
    failures: int = 0
    stalled_us: float = 0.0
    longest_stall_us: float = 0.0

    def stalled(self, microseconds: float) -> None:
        """One layer call took so long until it was computed again."""
        self.stalled_us += microseconds
        self.longest_stall_us = max(self.longest_stall_us, microseconds)
