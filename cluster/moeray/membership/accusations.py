"""When shards that find an expert group bad are believed.

A group that is given up ends and is replaced, which costs its experts' copies for as long as that takes. So:
* that it is BAD (a broken connection, no answer at all, an error where another group computed the same call) is
  believed at once if no expert is lost with the group. If one would be lost, most shards must say so: then the group is
  of no use to them, and one broken shard, or its network, cannot bring down what serves the others;
* that it is SLOW is believed when it was said often, and no expert is lost with the group.
A group that fails at rows of its own ends by itself, whoever needs it (expert_group/self_test.py).
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from enum import StrEnum

WINDOW_S = 60.0
"""How long an accusation is remembered."""
SLOW_TIMES = 3


class Charge(StrEnum):
    """What a shard says of a group; see module docstring."""

    SLOW = "slow"
    BAD = "bad"


@dataclass(frozen=True, slots=True)
class Accusation:
    """Attributes: by: the shard; at: when."""

    by: str
    group: str
    at: float
    charge: Charge


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
    find_it_bad = {accusation.by for accusation in against if accusation.charge is Charge.BAD}
    if loses_experts:
        return 2 * len(find_it_bad) > num_shards
    return bool(find_it_bad) or len(against) >= SLOW_TIMES
