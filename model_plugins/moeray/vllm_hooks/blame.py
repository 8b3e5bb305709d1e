"""Which groups of a route a shard does without, and what it says of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from moeray.membership import Charge
from moeray.transport.errors import GarbageRows, GroupFailed, PeerLost
from moeray.vllm_hooks.route import Route


@dataclass(frozen=True, slots=True)
class Blame:
    """Why a group is left out.

    Attributes:
        is_doubtful: it may only have been slow, or busy; one that gave errors is not tried again in this route.
    """

    reason: str
    is_doubtful: bool


def judged(route: Route, bad: Mapping[int, Blame], failure: PeerLost | GroupFailed) -> tuple[Blame, Charge]:
    """What the group of this failure is left out for, and what it is to be accused of.

    Args:
        bad: the groups that are left out already.
    """
    is_lost = isinstance(failure, PeerLost)
    reason = failure.reason if is_lost else f"gave an error: {failure.reason}"
    is_needed = not route.placement.covers(route.absent | {*bad, failure.group})
    charge = Charge.ABSENT
    if isinstance(failure, GarbageRows):
        charge = Charge.LIES
    elif isinstance(failure, PeerLost) and failure.is_late and not is_needed:
        charge = Charge.SLOW
    return Blame(reason, is_doubtful=is_lost), charge


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
