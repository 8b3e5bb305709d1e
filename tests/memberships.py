"""Short ways to say what happens to a membership, for the tests of the state machine."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from moeray.membership import Delays, Membership, Role
from moeray.placement import Layout

LAYOUT = Layout(num_layers=2, num_experts=12)
TWICE = Layout(num_layers=2, num_experts=12, num_redundant=12, min_copies=2)
DELAYS = Delays(join_debounce_s=1.0, regroup_s=60.0)
MODEL: Mapping[str, Any] = {"fingerprint": "abc"}


def start(target: int, layout: Layout = LAYOUT, epoch: int = 1) -> Membership:
    return Membership.start(target, layout, DELAYS, epoch=epoch)


def with_shard(state: Membership, id: str = "s", identity: Mapping[str, Any] = MODEL) -> Membership:
    """A shard that has loaded its model and waits for a generation."""
    return state.join(id=id, role=Role.ATTENTION_SHARD, pid=1, node=f"{id}-on-a-node").identify(id, identity)


def with_group(state: Membership, id: str, identity: Mapping[str, Any] = MODEL, node: str = "") -> Membership:
    """An expert group that is ready, with nothing loaded; on a node of its own, or that one."""
    state = state.join(id=id, role=Role.EXPERT_GROUP, pid=1, node=node or f"{id}-on-a-node")
    return state.identify(id, identity).ready(id, f"host:{id}")


def prepared(state: Membership) -> Membership:
    """What is proposed is prepared by everybody, and what that leads to, to the end."""
    while state.proposal is not None:
        number = state.proposal.number
        for id in state.proposal.groups:
            state = state.prepared(id, number)
        assert state.proposal is None or state.proposal.number > number
    return state


def adopted(state: Membership) -> Membership:
    """Every living shard has moved to the generation in force."""
    for shard in state.users():
        state = state.adopted(shard.id, state.current.number)
    return state


def formed(num_groups: int, layout: Layout = LAYOUT) -> Membership:
    """A cluster of one ready shard and so many groups, in its first generation."""
    state = with_shard(start(num_groups, layout)).ready("s", "host:s")
    for group in range(num_groups):
        state = with_group(state, f"g{group}")
    return adopted(prepared(state))


def later(state: Membership, seconds: float) -> Membership:
    return state.at(state.now + seconds).tick()
