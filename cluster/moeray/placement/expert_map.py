"""Versioned map: logical expert -> physical copies -> expert group.

Suffixes: L layers, E logical experts, S physical slots. A slot is one copy of one expert in one layer; the slots of a
layer lie group after group, so that redundancy is more slots than experts and nothing else.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


class PlacementError(ValueError):
    """A placement that does not cover the experts, with the arithmetic."""


@dataclass(frozen=True, slots=True)
class Placement:
    """One generation's expert map.

    Attributes:
        generation: grows with every change; every message on the hop carries it.
        num_experts: routed experts per layer (E).
        slots_per_group: physical slots of each group in every layer; sums to S.
        expert_of_slot: [L][S] logical expert held by each slot.
    """

    generation: int
    num_experts: int
    slots_per_group: tuple[int, ...]
    expert_of_slot: tuple[tuple[int, ...], ...]

    def __post_init__(self) -> None:
        num_slots = sum(self.slots_per_group)
        for layer, experts in enumerate(self.expert_of_slot):
            if len(experts) != num_slots:
                raise PlacementError(
                    f"layer {layer}: {len(experts)} slots are mapped, but the groups hold "
                    f"{' + '.join(map(str, self.slots_per_group))} = {num_slots}"
                )
            missing = set(range(self.num_experts)) - set(experts)
            if missing or len(set(experts)) != self.num_experts:
                raise PlacementError(
                    f"layer {layer}: no slot holds experts {sorted(missing)} of 0..{self.num_experts - 1}"
                )

    @property
    def num_groups(self) -> int:
        return len(self.slots_per_group)

    @property
    def num_layers(self) -> int:
        return len(self.expert_of_slot)

    def group_of_slot(self) -> tuple[int, ...]:
        """[S] the group that holds each slot."""
        return tuple(group for group, slots in enumerate(self.slots_per_group) for _ in range(slots))

    def experts_of_group(self, group: int, layer: int) -> tuple[int, ...]:
        """Logical experts that `group` holds in `layer`, ascending, each once."""
        start = sum(self.slots_per_group[:group])
        return tuple(sorted(set(self.expert_of_slot[layer][start : start + self.slots_per_group[group]])))

    def group_of_expert(self, layer: int) -> tuple[int, ...]:
        """[E] the group that serves each logical expert of `layer`: the first copy's."""
        owner = [-1] * self.num_experts
        for expert, group in zip(reversed(self.expert_of_slot[layer]), reversed(self.group_of_slot()), strict=True):
            owner[expert] = group
        return tuple(owner)

    def to_json(self) -> dict[str, Any]:
        return {
            "generation": self.generation,
            "num_experts": self.num_experts,
            "slots_per_group": list(self.slots_per_group),
            "expert_of_slot": [list(experts) for experts in self.expert_of_slot],
        }

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Placement:
        return cls(
            generation=int(data["generation"]),
            num_experts=int(data["num_experts"]),
            slots_per_group=tuple(data["slots_per_group"]),
            expert_of_slot=tuple(tuple(experts) for experts in data["expert_of_slot"]),
        )


def contiguous(*, generation: int, num_layers: int, num_experts: int, num_groups: int) -> Placement:
    """Every expert once, in runs as equal as division allows (the first groups take the remainder).

    Raises:
        PlacementError: fewer experts than groups.
    """
    if not 1 <= num_groups <= num_experts:
        raise PlacementError(
            f"{num_experts} experts cannot be spread over {num_groups} expert groups: 1..{num_experts} groups can"
        )
    base, extra = divmod(num_experts, num_groups)
    slots = tuple(base + (group < extra) for group in range(num_groups))
    return Placement(generation, num_experts, slots, (tuple(range(num_experts)),) * num_layers)
