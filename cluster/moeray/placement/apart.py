"""Copies of one expert on different nodes: the loss of a node is then the loss of one copy.

Suffixes: G groups, S slots.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from moeray.placement.expert_map import Placement


def apart(placement: Placement, node_G: Sequence[str]) -> Placement:
    """The same slots and copies, with experts swapped between groups so that fewer copies share a node.

    Swaps are made one at a time, each of which leaves fewer copies beside another one; what no single swap mends stays.
    Groups whose copies are apart already keep everything.

    Args:
        node_G: [G] where each group runs.
    """
    done: dict[tuple[int, ...], tuple[int, ...]] = {}
    for layer in placement.expert_of_slot:
        if layer not in done:
            done[layer] = _Layer(placement, layer, node_G).spread()
    layers = tuple(done[layer] for layer in placement.expert_of_slot)
    return Placement(placement.generation, placement.num_experts, placement.slots_per_group, layers)


def together(placement: Placement, node_G: Sequence[str]) -> int:
    """Copies, over all layers, that are on a node on which another one of the same expert is, too."""
    return sum(_Layer(placement, layer, node_G).num_together() for layer in placement.expert_of_slot)


class _Layer:
    """One layer: who holds what, and how many copies of each expert a node has."""

    def __init__(self, placement: Placement, layer: Sequence[int], node_G: Sequence[str]) -> None:
        self._node_G = node_G
        self._groups: list[list[int]] = []
        start = 0
        for num_slots in placement.slots_per_group:
            self._groups.append(list(layer[start : start + num_slots]))
            start += num_slots
        self._there = Counter(
            (expert, node) for experts, node in zip(self._groups, node_G, strict=True) for expert in experts
        )

    def num_together(self) -> int:
        return sum(count - 1 for count in self._there.values() if count > 1)

    def spread(self) -> tuple[int, ...]:
        """[S] after as many swaps as help."""
        for group, experts in enumerate(self._groups):
            for slot, expert in enumerate(experts):
                if self._there[expert, self._node_G[group]] > 1:
                    self._move(group, slot)
        return tuple(expert for experts in self._groups for expert in experts)

    def _move(self, group: int, slot: int) -> None:
        """Swap the expert there with one of another node, if that puts no copy beside another."""
        expert, here = self._groups[group][slot], self._node_G[group]
        for other, experts in enumerate(self._groups):
            there = self._node_G[other]
            if there == here or self._there[expert, there]:
                continue
            for place, back in enumerate(experts):
                if not self._there[back, here]:
                    self._groups[group][slot], experts[place] = back, expert
                    self._there.subtract([(expert, here), (back, there)])
                    self._there.update([(expert, there), (back, here)])
                    return
