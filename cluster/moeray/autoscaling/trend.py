"""A rate that grows is foreseen: Holt's linear trend over moments that are not evenly spaced."""

from __future__ import annotations

import math
from dataclasses import dataclass

SMOOTHED_S = 15.0
"""Of the level; the slope is smoothed over three times as long."""
NOISE = 0.05
"""So much of a rise, as a share of the level, is not believed."""
SETTLED = 0.2
"""A level that changes by no more than this share of it while it is smoothed stands still."""


@dataclass(frozen=True, slots=True)
class Trend:
    """Smoothed level and slope per second, at `at_s`; None before the first value."""

    level: float = 0.0
    slope: float = 0.0
    at_s: float | None = None

    def seen(self, value: float, now_s: float) -> Trend:
        """With one more value; the same moment again changes nothing."""
        if self.at_s is None:
            return Trend(value, 0.0, now_s)
        passed_s = now_s - self.at_s
        if passed_s <= 0:
            return self
        fast, slow = (1 - math.exp(-passed_s / each) for each in (SMOOTHED_S, 3 * SMOOTHED_S))
        foreseen = self.level + self.slope * passed_s
        level = max(0.0, foreseen + fast * (value - foreseen))
        slope = self.slope + slow * ((level - self.level) / passed_s - self.slope)
        return Trend(level, slope, now_s)

    def ahead(self, seconds: float) -> float:
        """The level then, if it rises; now's if it does not."""
        return self.level + max(0.0, self.slope * seconds - NOISE * self.level)

    @property
    def is_settled(self) -> bool:
        """Whether the level is that of the load, and not on its way there."""
        return abs(self.slope) * SMOOTHED_S <= SETTLED * self.level
