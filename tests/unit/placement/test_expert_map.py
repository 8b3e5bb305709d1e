"""Placement: every expert is served by exactly one group, whatever the copies."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moeray.placement import Placement, contiguous
from moeray.placement.expert_map import PlacementError


@st.composite
def placements(draw: st.DrawFn) -> Placement:
    """Any cover of E experts by slots, with redundancy, per layer in another order."""
    num_experts = draw(st.integers(1, 12))
    num_groups = draw(st.integers(1, 5))
    slots = draw(st.lists(st.integers(0, 6), min_size=num_groups, max_size=num_groups))
    slots[0] += max(0, num_experts - sum(slots))
    layers = []
    for _ in range(draw(st.integers(1, 3))):
        copies = draw(st.lists(st.integers(0, num_experts - 1), min_size=sum(slots) - num_experts, max_size=sum(slots)))
        layer = [*range(num_experts), *copies[: sum(slots) - num_experts]]
        layers.append(tuple(draw(st.permutations(layer))))
    return Placement(draw(st.integers(1, 99)), num_experts, tuple(slots), tuple(layers))


@given(placements())
def test_the_serving_group_of_every_expert_holds_it(placement: Placement) -> None:
    for layer in range(placement.num_layers):
        owners = placement.group_of_expert(layer)
        assert len(owners) == placement.num_experts
        for expert, group in enumerate(owners):
            assert expert in placement.experts_of_group(group, layer)


@given(placements())
def test_the_first_copy_serves(placement: Placement) -> None:
    groups = placement.group_of_slot()
    for layer, experts in enumerate(placement.expert_of_slot):
        for expert, group in enumerate(placement.group_of_expert(layer)):
            assert group == groups[experts.index(expert)]


@given(placements())
def test_json_round_trip_keeps_everything(placement: Placement) -> None:
    assert Placement.from_json(placement.to_json()) == placement


@given(st.integers(1, 40), st.data())
def test_contiguous_spreads_each_expert_once_and_evenly(num_experts: int, data: st.DataObject) -> None:
    num_groups = data.draw(st.integers(1, num_experts))
    placement = contiguous(generation=3, num_layers=2, num_experts=num_experts, num_groups=num_groups)
    held = [placement.experts_of_group(group, 1) for group in range(num_groups)]
    assert sorted(expert for experts in held for expert in experts) == list(range(num_experts))
    assert max(map(len, held)) - min(map(len, held)) <= 1


@pytest.mark.parametrize("num_groups", [0, 5])
def test_more_groups_than_experts_are_refused_with_the_numbers(num_groups: int) -> None:
    with pytest.raises(PlacementError, match=f"4 experts cannot be spread over {num_groups}"):
        contiguous(generation=1, num_layers=1, num_experts=4, num_groups=num_groups)


def test_a_layer_without_one_expert_is_refused_and_names_it() -> None:
    with pytest.raises(PlacementError, match=r"layer 1: no slot holds experts \[2\]"):
        Placement(1, 3, (2, 1), ((0, 1, 2), (0, 1, 1)))


def test_a_layer_with_an_unknown_expert_is_refused() -> None:
    with pytest.raises(PlacementError, match="layer 0"):
        Placement(1, 2, (3,), ((0, 1, 2),))


def test_slots_that_do_not_add_up_are_refused_with_the_sum() -> None:
    with pytest.raises(PlacementError, match=r"layer 0: 3 slots are mapped, but the groups hold 2 \+ 2 = 4"):
        Placement(1, 3, (2, 2), ((0, 1, 2),))
