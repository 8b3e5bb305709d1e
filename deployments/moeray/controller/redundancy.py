"""What `moeray status` shows of generations and copies."""

from __future__ import annotations

from typing import Any

from moeray.membership import Membership


def describe_generations(state: Membership) -> dict[str, Any]:
    """Keys of `moeray status --json`: wanted groups, the proposed generation, copies per expert."""
    proposal = state.proposal
    return {
        "groups": list(state.current.groups),
        "target_groups": state.target,
        "oldest_generation": state.oldest,
        "proposed": None
        if proposal is None
        else {
            "generation": proposal.number,
            "groups": list(proposal.groups),
            "waits_for": [id for id in proposal.groups if id not in state.prepared_by],
        },
        "copies": _copies(state),
    }


def _copies(state: Membership) -> dict[str, int] | None:
    """Of every expert of every layer: the fewest copies by the placement, the fewest living, experts without any."""
    placement, absent = state.current.placement, state.absent()
    if placement is None:
        return None
    away = {place for place, id in enumerate(state.current.groups) if id in absent}
    owners = placement.group_of_slot()
    fewest, living, lost = placement.num_groups, placement.num_groups, 0
    for layer in range(placement.num_layers):
        there = [0] * placement.num_experts
        for expert, group in zip(placement.expert_of_slot[layer], owners, strict=True):
            there[expert] += group not in away
        fewest = min(fewest, *placement.num_copies(layer))
        living, lost = min(living, *there), lost + there.count(0)
    return {"slots": len(owners), "fewest": fewest, "fewest_living": living, "experts_lost": lost}
