"""Which of the groups that are there serves which expert.

Suffixes: L layers, E experts, N groups that are there.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from moeray.placement import Placement


def owners(placement: Placement, groups: Sequence[int], shard: int) -> NDArray[np.int64]:
    """[L, E] index among these groups of the one that serves each expert to this shard; -1 where none does."""
    absent = frozenset(range(placement.num_groups)) - set(groups)
    index_of = np.full(placement.num_groups + 1, -1)  # the last one is for NOWHERE
    index_of[list(groups)] = np.arange(len(groups))
    numbers = [placement.group_of_expert(layer, shard, absent) for layer in range(placement.num_layers)]
    return index_of[np.array(numbers, dtype=np.int64)]


def all_replaceable(placement: Placement, groups: Sequence[int]) -> bool:
    """Whether any one of these groups can be done without: each expert is in two of them at least."""
    expert_LS = np.array(placement.expert_of_slot, dtype=np.int64)
    group_S = np.array(placement.group_of_slot())
    there_S = np.isin(group_S, list(groups))
    holds_LEN = np.zeros((placement.num_layers, placement.num_experts, placement.num_groups), dtype=bool)
    layers_L1 = np.arange(placement.num_layers)[:, None]
    holds_LEN[layers_L1, expert_LS[:, there_S], group_S[there_S]] = True
    return bool((holds_LEN.sum(axis=2) >= 2).all())
