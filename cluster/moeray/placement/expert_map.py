"""Versioned map: logical expert -> physical copies -> expert group.

Suffixes: L layers, E logical experts, S physical slots. A slot is one copy of one expert in one layer; the slots of a
layer lie group after group, so that redundancy is more slots than experts and nothing else.

Which copy serves is decided per shard, never per token: all tokens that one call of a shard sends to one expert go to
one copy. A row's bits depend on how many rows the same call sends to the same expert (measured: torch's fp32 product
of 1 to 3 rows differs from that of 4 and more), so spreading an expert's tokens over its copies would make answers
depend on the placement.
"""

from __future__ import annotations

from collections.abc import Set
from dataclasses import dataclass
from typing import Any

NOWHERE = -1
"""In place of a group: no living group holds the expert."""


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

    def copies_in_group(self, group: int, layer: int) -> tuple[int, ...]:
        """Those of `experts_of_group` that a group before it holds too: this group's redundant copies."""
        before = set(self.expert_of_slot[layer][: sum(self.slots_per_group[:group])])
        return tuple(expert for expert in self.experts_of_group(group, layer) if expert in before)

    def group_of_expert(self, layer: int, shard: int = 0, absent: Set[int] = frozenset()) -> tuple[int, ...]:
        """[E] the group that serves each logical expert of `layer` to attention shard number `shard`.

        The shards take turns at an expert's copies, and neighbouring experts begin at different ones: so copies share
        the load of many shards as well as of one.

        Args:
            absent: groups that are not asked; an expert whose copies are all there is NOWHERE.
        """
        groups_E = self._holders(layer)
        if absent:
            groups_E = [[group for group in groups if group not in absent] for groups in groups_E]
        return tuple(
            groups[(expert + shard) % len(groups)] if groups else NOWHERE for expert, groups in enumerate(groups_E)
        )

    def covers(self, absent: Set[int]) -> bool:
        """Whether every expert of every layer has a copy in a group that is not `absent`."""
        if not absent:
            return True
        owners = self.group_of_slot()
        return all(
            len({expert for expert, group in zip(experts, owners, strict=True) if group not in absent})
            == self.num_experts
            for experts in set(self.expert_of_slot)
        )

    def num_copies(self, layer: int) -> tuple[int, ...]:
        """[E] in how many groups each logical expert of `layer` is."""
        return tuple(len(set(groups)) for groups in self._holders(layer))

    def _holders(self, layer: int) -> list[list[int]]:
        """[E] the groups of each expert's slots, in slot order."""
        groups_E: list[list[int]] = [[] for _ in range(self.num_experts)]
        for expert, group in zip(self.expert_of_slot[layer], self.group_of_slot(), strict=True):
            groups_E[expert].append(group)
        return groups_E

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


def contiguous(
    *, generation: int, num_layers: int, num_experts: int, num_groups: int, num_redundant: int = 0
) -> Placement:
    """Experts 0..E-1 and again from 0, `num_redundant` more, cut into runs as equal as division allows.

    The first groups take the remainder. No run is longer than E, so a copy is never in a group that holds the expert
    already; every layer is cut the same way.

    Raises:
        PlacementError: fewer experts than groups, or more copies than the groups can hold without holding one twice.
    """
    if not 1 <= num_groups <= num_experts:
        raise PlacementError(
            f"{num_experts} experts cannot be spread over {num_groups} expert groups: 1..{num_experts} groups can"
        )
    most = num_experts * (num_groups - 1)
    if not 0 <= num_redundant <= most:
        raise PlacementError(
            f"{num_redundant} redundant copies of {num_experts} experts do not fit into {num_groups} expert groups: "
            f"each can hold every expert once, and the first copies take {num_experts} of the "
            f"{num_experts} x {num_groups} places, so 0..{most} can"
        )
    base, extra = divmod(num_experts + num_redundant, num_groups)
    slots = tuple(base + (group < extra) for group in range(num_groups))
    layer = tuple(slot % num_experts for slot in range(num_experts + num_redundant))
    return Placement(generation, num_experts, slots, (layer,) * num_layers)
