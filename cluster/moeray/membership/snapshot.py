"""The state as JSON, so that a controller that starts anew goes on where its predecessor stopped."""

from __future__ import annotations

import json
from dataclasses import replace
from types import MappingProxyType
from typing import Any

from moeray.membership.cluster_state import Delays
from moeray.membership.generation import Generation
from moeray.membership.members import Member
from moeray.membership.state import Membership
from moeray.placement import Layout

VERSION = 1


class SnapshotError(ValueError):
    """A snapshot that cannot be read, or that is of another model."""


def to_json(state: Membership) -> str:
    """What must survive. Two states with the same text need not be written twice: times and versions are not in it."""
    layout = state.layout
    return json.dumps(
        {
            "format": VERSION,
            "experts": [layout.num_layers, layout.num_experts],
            "target": state.target,
            "newest": state.newest,
            "claimed": state.claimed,
            "current": state.current.to_json(),
            "proposal": state.proposal and state.proposal.to_json(),
            "prepared_by": sorted(state.prepared_by),
            "past": [generation.to_json() for generation in state.past],
            "floors": dict(state.floors),
            "served": None if state.served is None else dict(state.served),
            "members": [member.to_json() for member in state.members.values()],
        },
        sort_keys=True,
    )


def from_json(text: str, layout: Layout, delays: Delays, *, epoch: int, now: float) -> Membership:
    """The state as it was, with every living member awaited and all clocks started anew.

    Raises:
        SnapshotError: see there.
    """
    try:
        return _read(json.loads(text), layout, delays, epoch=epoch, now=now)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise SnapshotError(f"the controller's snapshot cannot be read: {type(error).__name__}: {error}") from error


def _read(data: dict[str, Any], layout: Layout, delays: Delays, *, epoch: int, now: float) -> Membership:
    if data["format"] != VERSION:
        raise SnapshotError(f"format {data['format']!r} is not {VERSION}")
    if data["experts"] != [layout.num_layers, layout.num_experts]:
        raise SnapshotError(
            f"it places {data['experts']} layers and experts, the model has {layout.num_layers}, {layout.num_experts}"
        )
    members = {member.id: member for member in map(Member.from_json, data["members"])}
    state = Membership(
        layout,
        delays,
        target=int(data["target"]),
        epoch=epoch,
        now=now,
        newest=int(data["newest"]),
        claimed=int(data["claimed"]),
        current=Generation.from_json(data["current"]),
        proposal=data["proposal"] and Generation.from_json(data["proposal"]),
        prepared_by=frozenset(data["prepared_by"]),
        past=tuple(Generation.from_json(generation) for generation in data["past"]),
        floors=MappingProxyType(dict(data["floors"])),
        served=data["served"] if data["served"] is None else MappingProxyType(data["served"]),
        members=MappingProxyType(members),
        awaited=frozenset(id for id, member in members.items() if member.is_alive),
        last_ready=now,
    )
    return replace(state, unsettled_since=None if state.is_settled else now)
