"""Which groups of a route a shard does without, and what it says of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from moeray.membership import Charge
from moeray.transport.errors import GroupFailed, PeerLost
from moeray.vllm_hooks.route import Route

MAX_ERRORS = 3
"""So often may a group that no other can stand in for fail at one call, until the call may be what is wrong."""


@dataclass(frozen=True, slots=True)
class Blame:
    """Why a group is left out.

    Attributes:
        charge: what it is accused of.
        is_doubtful: it may only have been slow, or busy; one that gave errors is not tried again in this route, if
            others can do without it.
    """

    reason: str
    is_doubtful: bool
    charge: Charge = Charge.BAD


def judged(route: Route, bad: Mapping[int, Blame], failure: PeerLost | GroupFailed) -> Blame:
    """What the group of this failure is left out for.

    Args:
        bad: the groups that are left out already.
    """
    is_needed = not route.placement.covers(route.absent | {*bad, failure.group})
    if isinstance(failure, GroupFailed):
        return Blame(f"gave an error: {failure.reason}", is_doubtful=is_needed)
    is_merely_slow = failure.is_late and not is_needed
    return Blame(failure.reason, is_doubtful=True, charge=Charge.SLOW if is_merely_slow else Charge.BAD)


def may_be_the_calls_own(errors: Sequence[tuple[str, str]]) -> bool:
    """Whether errors (group id, reason) that one call got may be the call's: two groups agree, or one says it often."""
    return len({group_id for group_id, _ in errors}) > 1 or len(errors) >= MAX_ERRORS


def beyond_doubt(bad: Mapping[int, Blame]) -> dict[int, Blame]:
    """Those that need not be tried again."""
    return {group: blame for group, blame in dict(bad).items() if not blame.is_doubtful}


def can_carry(route: Route, bad: Mapping[int, Blame], layer: int, expert_ids_TK: Tensor) -> bool:
    """Whether every expert that a layer call needs has a copy without the groups that are left out."""
    absent = route.absent | frozenset(bad)
    if route.placement.covers(absent):
        return True
    owners_E = route.placement.group_of_expert(layer, 0, absent)
    return all(owners_E[expert] >= 0 for expert in expert_ids_TK.unique().tolist())
