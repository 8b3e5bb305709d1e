"""What `arrange` promises for any groups, any load and any placement before."""

from __future__ import annotations

import random
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moeray.placement import Layout, Placement, PlacementError, arrange, contiguous
from moeray.placement.balance import fit_copies, imbalance, num_moves

Inherits = list[int | None]


@st.composite
def layouts(draw: st.DrawFn) -> Layout:
    num_experts = draw(st.integers(2, 14))
    min_copies = draw(st.integers(1, 3))
    redundant = draw(st.integers((min_copies - 1) * num_experts, 3 * num_experts))
    return Layout(draw(st.integers(1, 3)), num_experts, redundant, min_copies)


def loads(layout: Layout) -> st.SearchStrategy[list[list[int]]]:
    row = st.lists(st.integers(0, 1000), min_size=layout.num_experts, max_size=layout.num_experts)
    return st.lists(row, min_size=layout.num_layers, max_size=layout.num_layers)


def changed(draw: st.DrawFn, num_before: int, num_experts: int) -> Inherits:
    """Some groups stay, some go, some are new, in another order."""
    stay = draw(st.lists(st.integers(0, num_before - 1), unique=True, max_size=num_experts))
    new = draw(st.integers(0 if stay else 1, max(1, min(4, num_experts - len(stay)))))
    inherits: Inherits = [*stay, *[None] * new]
    return list(draw(st.permutations(inherits[:num_experts])))


@st.composite
def histories(draw: st.DrawFn) -> tuple[Layout, list[tuple[Inherits, Placement | None, Placement]]]:
    """A few placements, each arranged from the one before."""
    layout = draw(layouts())
    inherits: Inherits = [None] * draw(st.integers(1, min(6, layout.num_experts)))
    steps: list[tuple[Inherits, Placement | None, Placement]] = []
    previous: Placement | None = None
    for number in range(1, draw(st.integers(2, 5))):
        rows = draw(st.none() | loads(layout))
        wanted = st.lists(st.integers(0, 9), min_size=layout.num_experts, max_size=layout.num_experts)
        copies = draw(st.none() | st.lists(wanted, min_size=layout.num_layers, max_size=layout.num_layers))
        placement = arrange(layout, number, inherits, previous, rows_LE=rows, copies_LE=copies)
        steps.append((inherits, previous, placement))
        previous, inherits = placement, changed(draw, placement.num_groups, layout.num_experts)
    return layout, steps


@given(histories())
def test_slots_are_equal_no_expert_is_twice_in_a_group_and_each_has_its_copies(
    history: tuple[Layout, list[tuple[Inherits, Placement | None, Placement]]],
) -> None:
    layout, steps = history
    for number, (inherits, _, placement) in enumerate(steps, 1):
        num_groups = len(inherits)
        assert (placement.generation, placement.num_groups, placement.num_layers) == (
            number, num_groups, layout.num_layers,
        )  # fmt: skip
        assert max(placement.slots_per_group) - min(placement.slots_per_group) <= 1
        assert sum(placement.slots_per_group) == min(
            layout.num_experts + layout.num_redundant, layout.num_experts * num_groups
        )
        for layer in range(layout.num_layers):
            sizes = [len(placement.experts_of_group(group, layer)) for group in range(num_groups)]
            assert sizes == list(placement.slots_per_group), "no expert twice in one group"
            assert min(placement.num_copies(layer)) >= min(layout.min_copies, num_groups)


@given(histories())
def test_a_group_that_takes_anothers_place_moves_nothing(
    history: tuple[Layout, list[tuple[Inherits, Placement | None, Placement]]],
) -> None:
    layout, steps = history
    *_, last = steps
    same: Inherits = list(range(last[2].num_groups))
    again = arrange(layout, 99, same, last[2])
    assert again.expert_of_slot == last[2].expert_of_slot
    assert num_moves(again, same, last[2]) == 0


@given(layouts(), st.data())
def test_the_loss_of_a_group_moves_what_it_had_and_little_more(layout: Layout, data: st.DataObject) -> None:
    """Least possible are the slots that are newly filled; where no free place lacks the expert, another makes room."""
    num_groups = data.draw(st.integers(2, min(6, layout.num_experts)))
    before = arrange(layout, 1, [None] * num_groups)
    gone = data.draw(st.integers(0, num_groups - 1))
    inherits: Inherits = [group for group in range(num_groups) if group != gone]
    after = arrange(layout, 2, inherits, before)
    had = [before.slots_per_group[group] for group in range(num_groups) if group != gone]
    filled = sum(max(0, has - had) for has, had in zip(after.slots_per_group, had, strict=True))
    assert num_moves(after, inherits, before) <= 2 * layout.num_layers * max(filled, before.slots_per_group[gone])


def test_a_lost_groups_experts_alone_are_moved() -> None:
    layout = Layout(2, 12)
    before = contiguous(generation=1, num_layers=2, num_experts=12, num_groups=4)
    after = arrange(layout, 2, [0, 2, 3], before)
    assert num_moves(after, [0, 2, 3], before) == 2 * 3
    assert after.slots_per_group == (4, 4, 4)


def test_a_new_group_takes_its_share_and_no_more() -> None:
    layout = Layout(1, 12)
    before = contiguous(generation=1, num_layers=1, num_experts=12, num_groups=3)
    after = arrange(layout, 2, [0, 1, 2, None], before)
    assert (after.slots_per_group, num_moves(after, [0, 1, 2, None], before)) == ((3, 3, 3, 3), 3)


def test_the_first_placement_without_load_is_contiguous() -> None:
    layout = Layout(2, 8, 8, 2)
    first = arrange(layout, 5, [None, None, None])
    assert first == contiguous(generation=5, num_layers=2, num_experts=8, num_groups=3, num_redundant=8)
    assert arrange(layout, 5, [None, None, None], first) == first


@given(layouts(), st.data())
def test_levelling_never_makes_a_placement_worse_for_the_load_it_is_made_for(
    layout: Layout, data: st.DataObject
) -> None:
    num_groups = data.draw(st.integers(1, min(6, layout.num_experts)))
    rows = data.draw(loads(layout))
    before = arrange(layout, 1, [None] * num_groups)
    stay: Inherits = list(range(num_groups))
    after = arrange(layout, 2, stay, before, rows_LE=rows)
    assert imbalance(after, rows) <= imbalance(before, rows) + 1e-9


def test_one_busy_half_becomes_two_equal_groups() -> None:
    layout = Layout(1, 8)
    rows = [[100, 100, 100, 100, 1, 1, 1, 1]]
    before = contiguous(generation=1, num_layers=1, num_experts=8, num_groups=2)
    after = arrange(layout, 2, [0, 1], before, rows_LE=rows)
    assert imbalance(before, rows) == pytest.approx(400 / 202)
    assert imbalance(after, rows) == pytest.approx(1.0)
    assert num_moves(after, [0, 1], before) == 4, "two pairs were swapped"


def test_busy_experts_get_the_copies_that_are_free() -> None:
    assert fit_copies([1, 1, 1, 1], [90.0, 5.0, 60.0, 5.0], 7, 1, 3) == [3, 1, 2, 1]
    assert fit_copies([1, 1, 1, 1], [90.0, 5.0, 60.0, 5.0], 9, 2, 3) == [3, 2, 2, 2]
    assert fit_copies([9, 0, 9, 9], [1.0, 1.0, 9.0, 5.0], 8, 1, 3) == [1, 1, 3, 3]


def test_nothing_to_place_on_is_an_error() -> None:
    for inherits in ([], [None] * 5):
        with pytest.raises(PlacementError, match=rf"4 experts cannot be spread over {len(inherits)} expert groups"):
            arrange(Layout(1, 4), 1, inherits)


def test_imbalance_without_load_is_none() -> None:
    placement = contiguous(generation=1, num_layers=1, num_experts=4, num_groups=2)
    assert imbalance(placement, [[0, 0, 0, 0]]) == 1.0


def test_the_largest_published_model_is_arranged_within_a_pause() -> None:
    """61 layers x 384 experts with 64 extra copies on 64 groups; the bound is far above what it takes (1 s)."""
    draw = random.Random(1)
    layout = Layout(61, 384, 64)
    before = arrange(layout, 1, [None] * 64)
    rows = [[draw.paretovariate(1.2) for _ in range(384)] for _ in range(61)]
    started = time.process_time()
    after = arrange(layout, 2, list(range(64)), before, rows_LE=rows)
    assert imbalance(after, rows) < imbalance(before, rows)
    assert time.process_time() - started < 60
