"""Copies go to different nodes where a swap can bring them there, and nothing else changes."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moeray.placement import Layout, Placement, apart, arrange, contiguous, together


@st.composite
def placed(draw: st.DrawFn) -> tuple[Placement, list[str]]:
    num_experts, num_groups = draw(st.integers(2, 14)), draw(st.integers(1, 6))
    num_groups = min(num_groups, num_experts)
    layout = Layout(draw(st.integers(1, 3)), num_experts, draw(st.integers(0, 3 * num_experts)))
    rows = [
        draw(st.lists(st.integers(0, 99), min_size=num_experts, max_size=num_experts)) for _ in range(layout.num_layers)
    ]
    placement = arrange(layout, 1, [None] * num_groups, rows_LE=rows)
    return placement, draw(st.lists(st.sampled_from("abc"), min_size=num_groups, max_size=num_groups))


@given(placed())
def test_the_same_copies_lie_in_the_same_slots_and_none_comes_beside_another(
    given: tuple[Placement, list[str]],
) -> None:
    placement, nodes = given
    after = apart(placement, nodes)
    assert after.slots_per_group == placement.slots_per_group and after.generation == placement.generation
    for layer in range(placement.num_layers):
        assert Counter(after.expert_of_slot[layer]) == Counter(placement.expert_of_slot[layer])
        for group in range(after.num_groups):
            held = after.experts_of_group(group, layer)
            assert len(set(held)) == len(held) == placement.slots_per_group[group]
    assert together(after, nodes) <= together(placement, nodes)
    if not together(placement, nodes):
        assert after == placement
    assert apart(after, nodes) == after or together(apart(after, nodes), nodes) < together(after, nodes)


@pytest.mark.parametrize(("num_experts", "per_node", "num_nodes"), [(16, 2, 2), (64, 8, 2), (256, 8, 4), (384, 4, 3)])
def test_two_copies_of_everything_survive_the_loss_of_any_node(num_experts: int, per_node: int, num_nodes: int) -> None:
    groups = per_node * num_nodes
    before = contiguous(
        generation=1, num_layers=2, num_experts=num_experts, num_groups=groups, num_redundant=num_experts
    )
    for nodes in (
        [str(group // per_node) for group in range(groups)], [str(group % num_nodes) for group in range(groups)],
    ):  # fmt: skip
        after = apart(before, nodes)
        assert together(after, nodes) == 0
        for lost in set(nodes):
            assert after.covers({group for group, node in enumerate(nodes) if node == lost})


def test_on_one_node_nothing_moves() -> None:
    before = contiguous(generation=3, num_layers=1, num_experts=8, num_groups=4, num_redundant=8)
    assert apart(before, ["here"] * 4) == before and together(before, ["here"] * 4) == 8
