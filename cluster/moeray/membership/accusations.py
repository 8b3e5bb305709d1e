"""When shards that find an expert group bad are believed.

A group that is given up ends and is replaced, which costs its experts' copies for as long as that takes. So:
* one who is certain (garbage, a broken connection, no answer at all) is believed at once if no expert is lost with the
  group;
* if one would be lost, most shards must be certain: then the group is of no use to them, and one broken shard cannot
  bring down what serves the others;
* one who only finds it slow is believed when that was said often, and no expert is lost with the group.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

WINDOW_S = 60.0
"""How long an accusation is remembered."""
SLOW_TIMES = 3


@dataclass(frozen=True, slots=True)
class Accusation:
    """Attributes: by: the shard; at: when; certain: it is bad, not merely slow."""

    by: str
    group: str
    at: float
    certain: bool


def recent(accusations: Collection[Accusation], now: float, alive: Collection[str]) -> tuple[Accusation, ...]:
    """Those that still count: young, and by and of somebody who is alive."""
    return tuple(a for a in accusations if now - a.at < WINDOW_S and a.by in alive and a.group in alive)


def convicted(accusations: Collection[Accusation], group: str, *, num_shards: int, loses_experts: bool) -> bool:
    """Whether `group` is to be given up; see module docstring.

    Args:
        num_shards: that are alive and may use it.
        loses_experts: without it some expert has no living copy.
    """
    against = [accusation for accusation in accusations if accusation.group == group]
    certain = {accusation.by for accusation in against if accusation.certain}
    if loses_experts:
        return 2 * len(certain) > num_shards
    return bool(certain) or len(against) >= SLOW_TIMES
