"""What the state calls for after an event: withdraw, commit, forget and propose generations. Pure functions."""

from __future__ import annotations

from dataclasses import replace
from types import MappingProxyType
from typing import Any, TypeVar

from moeray.membership.cluster_state import ClusterState
from moeray.membership.generation import succeed
from moeray.membership.members import Member

State = TypeVar("State", bound=ClusterState)


def changed(state: State, **changes: Any) -> State:
    """The next version of the state."""
    return replace(state, version=state.version + 1, **changes)


def settled(state: State) -> State:
    """The state after everything that it calls for by itself."""
    proposal = state.proposal
    if proposal is not None:
        candidates = state.candidates()
        is_whole = {member.id for member in candidates}.issuperset(proposal.groups)
        if not is_whole and not state.awaited:
            state = changed(state, proposal=None, prepared_by=frozenset())
        elif is_whole and state.prepared_by.issuperset(proposal.groups) and state.is_confirmed(candidates):
            state = committed(state)
    state = _tidied(state)
    wanted = _wanted(state)
    return _proposed(state, wanted) if wanted else state


def committed(state: State) -> State:
    """The proposed generation is in force."""
    proposal = state.proposal
    assert proposal is not None
    members = dict(state.members)
    for id in proposal.groups:
        if id in members:
            members[id] = replace(members[id], generation=proposal.number)
    first = members.get(proposal.groups[0])
    return changed(
        state,
        current=proposal,
        proposal=None,
        prepared_by=frozenset(),
        past=(*state.past, *([state.current] if state.current.number else [])),
        served=first.identity if first is not None and first.identity is not None else state.served,
        members=MappingProxyType(members),
    )


def _tidied(state: State) -> State:
    """Without what nobody needs any more, and with the clock of an unsettled state started or stopped."""
    alive = {id: floor for id, floor in state.floors.items() if id in state.members and state.members[id].is_alive}
    if len(alive) < len(state.floors):
        state = replace(state, floors=MappingProxyType(alive))
    used = tuple(generation for generation in state.past if generation.number >= state.oldest)
    if len(used) < len(state.past):
        state = changed(state, past=used)
    if state.is_settled:
        return replace(state, unsettled_since=None)
    return state if state.unsettled_since is not None else replace(state, unsettled_since=state.now)


def _wanted(state: ClusterState) -> list[Member]:
    """The groups of the generation to propose now; none if there is none to propose."""
    if state.is_settled or state.proposal is not None or state.awaited:
        return []
    candidates = state.candidates()
    if len(candidates) == state.target:
        return candidates
    if len(candidates) > state.target and state.now - state.last_ready >= state.delays.join_debounce_s:
        return candidates
    has_served = max(state.current.number, state.claimed) > 0
    waited_s = 0.0 if state.unsettled_since is None else state.now - state.unsettled_since
    return candidates if has_served and waited_s >= state.delays.regroup_s else []


def _proposed(state: State, groups: list[Member]) -> State:
    number = state.newest + 1
    return changed(
        state,
        newest=number,
        proposal=succeed(state.current, number, groups, state.layout),
        prepared_by=frozenset(),
        target=max(state.target, len(groups)),
    )
