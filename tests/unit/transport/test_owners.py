"""Who serves an expert when some groups are not there, and who can be done without."""

from __future__ import annotations

import random
from itertools import combinations

import pytest

from moeray.placement import Placement, contiguous
from moeray.transport.owners import all_replaceable, owners


def shuffled(num_groups: int, num_redundant: int, seed: int) -> Placement:
    """Every layer in another order, with no expert twice in a group."""
    whole = contiguous(generation=1, num_layers=3, num_experts=8, num_groups=num_groups, num_redundant=num_redundant)
    layers = []
    for number, layer in enumerate(whole.expert_of_slot):
        names = list(range(8))
        random.Random(seed + number).shuffle(names)
        layers.append(tuple(names[expert] for expert in layer))
    return Placement(1, 8, whole.slots_per_group, tuple(layers))


@pytest.mark.parametrize(("num_groups", "num_redundant"), [(1, 0), (2, 0), (2, 8), (3, 5), (4, 8), (4, 24)])
@pytest.mark.parametrize("shard", [0, 1, 5])
def test_owners_and_replaceable_groups_are_what_the_placement_says(
    num_groups: int, num_redundant: int, shard: int
) -> None:
    placement = shuffled(num_groups, num_redundant, seed=num_redundant)
    for size in range(1, num_groups + 1):
        for there in combinations(range(num_groups), size):
            absent = frozenset(range(num_groups)) - set(there)
            for layer, owners_E in enumerate(owners(placement, there, shard).tolist()):
                expected = placement.group_of_expert(layer, shard, absent)
                assert [there[owner] if owner >= 0 else -1 for owner in owners_E] == list(expected)
            replaceable = all(placement.covers(absent | {group}) for group in there)
            assert all_replaceable(placement, there) == replaceable
