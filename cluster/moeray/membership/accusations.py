"""When shards that find an expert group bad are believed.

A group that is given up ends and is replaced, which costs its experts' copies for as long as that takes. So:
* that it LIES is believed at once, whoever says so: the group itself answered that what it computed is garbage, so it
  is of no use to the others either, whether they have asked it yet or not;
* that it is ABSENT (a broken connection, no answer at all) is believed at once if no expert is lost with the group. If
  one would be lost, most shards must say so: the shard's own network may be what is broken, and one broken shard must
  not bring down what serves the others;
* that it is SLOW is believed when it was said often, and no expert is lost with the group.
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
    ABSENT = "absent"
    LIES = "lies"


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
    charges = {accusation.charge for accusation in against}
    if Charge.LIES in charges:
        return True
    if loses_experts:
        return 2 * len({accusation.by for accusation in against if accusation.charge is Charge.ABSENT}) > num_shards
    return Charge.ABSENT in charges or len(against) >= SLOW_TIMES
