"""Load that groups report becomes a better placement, if that is worth the moves."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from memberships import MODEL, adopted, prepared, with_group, with_shard

from moeray.controller import rebalance as module
from moeray.controller.rebalance import LoadWindow, better_placement, rebalance
from moeray.membership import Membership
from moeray.placement import Layout, Placement, arrange, together
from moeray.placement.balance import imbalance

LAYOUT = Layout(num_layers=3, num_experts=8)
HERE = ["here", "here"]


def report(**layers: list[int]) -> dict[str, Any]:
    return {"experts": {"tokens_per_layer": {int(name[1:]): counts for name, counts in layers.items()}}}


def test_rows_are_those_since_the_window_began_of_all_groups_together() -> None:
    window = LoadWindow()
    window.begin({"a": report(l1=[5] * 8), "gone": report(l1=[7] * 8), "shard": {"hop": {}}})
    rows = window.rows({"a": report(l1=[6] * 8), "new": report(l1=[2] * 8, l2=[1] * 8)}, LAYOUT)
    assert rows == [[0] * 8, [3] * 8, [1] * 8]


def test_a_counter_that_began_anew_is_not_negative_load() -> None:
    window = LoadWindow()
    window.begin({"a": report(l1=[5] * 8)})
    assert window.rows({"a": report(l1=[2] * 8)}, LAYOUT)[1] == [0] * 8


def test_equal_load_moves_nothing() -> None:
    before = arrange(LAYOUT, 1, [None, None])
    assert better_placement(LAYOUT, before, [[0.0] * 8, [50.0] * 8, [50.0] * 8], HERE) is None


def test_unequal_load_is_spread_and_layers_without_experts_stay_as_they_are() -> None:
    before = arrange(LAYOUT, 1, [None, None])
    rows = [[0.0] * 8, [90.0] * 4 + [10.0] * 4, [10.0] * 4 + [90.0] * 4]
    after = better_placement(LAYOUT, before, rows, HERE)
    assert after is not None
    assert (imbalance(before, rows), imbalance(after, rows)) == (pytest.approx(1.8), pytest.approx(1.0))
    assert after.expert_of_slot[0] == before.expert_of_slot[0]


def test_the_busiest_experts_get_the_copies_that_are_free() -> None:
    layout = Layout(num_layers=1, num_experts=8, num_redundant=8 + 4, min_copies=2)
    before = arrange(layout, 1, [None] * 4)
    rows = [[10.0, 10.0, 10.0, 10.0, 10.0, 10.0, 400.0, 400.0]]
    after = better_placement(layout, before, rows, ["n"] * 4)
    assert after is not None
    assert after.num_copies(0) == (2, 2, 2, 2, 2, 2, 4, 4)
    assert imbalance(after, rows) < imbalance(before, rows) - 0.1


def test_copies_that_are_placed_by_load_stay_on_different_nodes() -> None:
    layout = Layout(num_layers=1, num_experts=8, num_redundant=8, min_copies=2)
    nodes = ["first", "first", "second", "second"]
    before = arrange(layout, 1, [None] * 4)
    after = better_placement(layout, before, [[100.0] * 4 + [10.0] * 4], nodes)
    assert after is not None and together(after, nodes) == 0


async def test_load_that_lies_unequally_becomes_a_generation_of_the_same_groups(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """All but the process that computes the placement."""

    async def here(*arguments: Any) -> Placement | None:
        return better_placement(*arguments)

    monkeypatch.setattr(module, "find_better", here)
    state = with_shard(Membership.start(2, LAYOUT), "s", MODEL)
    state = adopted(prepared(with_group(with_group(state, "a"), "b")))
    reports = {"a": report(l1=[0] * 8)}
    proposed = asyncio.Event()

    def propose(placement: Placement, based_on: int) -> None:
        nonlocal state
        state = state.propose_placement(placement, based_on)
        proposed.set()

    task = asyncio.create_task(rebalance(0.05, LAYOUT, lambda: state, lambda: reports, propose))
    await asyncio.sleep(0)
    reports["a"] = report(l1=[90] * 4 + [10] * 4)
    await asyncio.wait_for(proposed.wait(), 60)
    task.cancel()
    after = prepared(state)
    assert (after.current.number, after.current.groups) == (2, ("a", "b"))
    assert after.current.placement is not None
    assert imbalance(after.current.placement, [[0.0] * 8, [90.0] * 4 + [10.0] * 4]) == pytest.approx(1.0)
