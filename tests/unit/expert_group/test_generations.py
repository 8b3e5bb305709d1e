"""A group holds what its generations need, serves no other, and nothing that it serves waits for a load."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager, suppress
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moeray.deepseek_v4 import CheckpointError, ExpertError, RoutedExperts
from moeray.deepseek_v4.checkpoint import Checkpoint
from moeray.expert_group import generations
from moeray.expert_group.generations import (
    NICENESS,
    ExpertsPerLayer,
    GenerationFollower,
    LoadFailed,
    generations_of,
    union,
    wanted_generations,
)
from moeray.membership import View
from moeray.placement import Placement, contiguous
from moeray.tiny import checkpoint_path

ME, OTHER, THIRD = "me", "other", "third"
LAYERS = (0, 1)
NUM_EXPERTS = 6


def placement(generation: int, num_groups: int, num_redundant: int = 0) -> Placement:
    return contiguous(
        generation=generation, num_layers=2, num_experts=NUM_EXPERTS, num_groups=num_groups, num_redundant=num_redundant
    )


def view(
    version: int = 1, *, generation: int = 0, groups: tuple[str, ...] = (), proposed: int = 0,
    proposed_groups: tuple[str, ...] = (), oldest: int | None = None, epoch: int = 7,
) -> View:  # fmt: skip
    return View(
        epoch=epoch, version=version, generation=generation, groups=groups, addresses=("x:1",) * len(groups),
        is_complete=True, is_covered=True, missing=(), proposed=proposed, proposed_groups=proposed_groups,
        oldest=generation if oldest is None else oldest, lost=frozenset(), draining=frozenset(), may_leave=frozenset(),
        shards={}, row_servers={}, mismatches={},
    )  # fmt: skip


class Controller:
    """What a group asks of its member: placements that it knows, and what it was told."""

    def __init__(self, **placements: Placement) -> None:
        self.placements = {each.generation: each for each in placements.values()}
        self.told: list[int] = []
        self.asked: list[int] = []

    async def placement(self, generation: int) -> dict[str, Any] | None:
        self.asked.append(generation)
        found = self.placements.get(generation)
        return None if found is None else found.to_json()

    async def prepared(self, generation: int) -> None:
        self.told.append(generation)


class Shelf:
    """Experts that are only numbers; loading one takes what `before_each` takes."""

    def __init__(self, before_each: Callable[[int, int], None] = lambda *_: None) -> None:
        self.items: set[tuple[int, int]] = set()
        self.before_each = before_each
        self.read: list[tuple[int, int]] = []

    @property
    def held(self) -> dict[int, tuple[int, ...]]:
        layers = sorted({layer for layer, _ in self.items})
        return {layer: tuple(sorted(e for at, e in self.items if at == layer)) for layer in layers}

    def hold(self, wanted: ExpertsPerLayer, on_progress: Callable[[int, int], None]) -> None:
        for layer, experts in wanted.items():
            for expert in sorted(set(experts) - {e for at, e in self.items if at == layer}):
                self.before_each(layer, expert)
                self.read.append((layer, expert))
                self.items.add((layer, expert))
                on_progress(len(self.read), 99)

    def release(self, wanted: ExpertsPerLayer) -> None:
        self.items = {(layer, expert) for layer, expert in self.items if expert in wanted.get(layer, ())}


class Server:
    """What is served, and that every expert of it is held at every moment."""

    def __init__(self) -> None:
        self.positions: dict[int, int] = {}
        self.history: list[dict[int, int]] = []

    def serve_generations(self, positions: Mapping[int, int]) -> None:
        self.positions = dict(positions)
        self.history.append(self.positions)


class Group:
    """A follower with what it works on."""

    def __init__(self, controller: Controller, shelf: Shelf | None = None) -> None:
        self.shelf, self.server, self.controller = shelf or Shelf(), Server(), controller
        self.follower = GenerationFollower(ME, LAYERS, self.shelf, self.server, controller)

    async def until(self, condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(60):
            while not condition():
                await asyncio.sleep(0.005)


@asynccontextmanager
async def following(controller: Controller, shelf: Shelf | None = None) -> AsyncIterator[Group]:
    group = Group(controller, shelf)
    task = asyncio.create_task(group.follower.run())
    try:
        yield group
        assert not task.done()
    finally:
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task


def both(*experts: int) -> dict[int, tuple[int, ...]]:
    return dict.fromkeys(LAYERS, experts)


# --- what is wanted (pure) ------------------------------------------------------------------------------------------


def test_a_group_wants_what_is_in_force_and_proposed_with_it_and_what_shards_still_use() -> None:
    assert wanted_generations(view(), ME, (), 0) == set()
    assert wanted_generations(view(proposed=1, proposed_groups=(OTHER, ME)), ME, (), 0) == {1}
    assert generations_of(view(proposed=1, proposed_groups=(OTHER, ME)), ME) == {1: 1}
    committed = view(generation=2, groups=(OTHER, ME), oldest=1)
    assert wanted_generations(committed, ME, {1, 2}, 2) == {1, 2}
    left_out = view(generation=3, groups=(OTHER,), oldest=2)
    assert wanted_generations(left_out, ME, {1, 2}, 2) == {2}
    assert wanted_generations(view(generation=3, groups=(OTHER,)), ME, {1, 2}, 2) == set()


def test_a_proposal_that_was_withdrawn_is_not_wanted() -> None:
    assert wanted_generations(
        view(generation=1, groups=(ME,), proposed=3, proposed_groups=(OTHER,)), ME, {1, 2}, 1
    ) == {1}


def test_a_controller_that_lost_its_memory_ends_nothing() -> None:
    forgotten = view(epoch=8, generation=0, proposed=6, proposed_groups=(ME,))
    assert wanted_generations(forgotten, ME, {4, 5}, 5) == {4, 5, 6}
    assert wanted_generations(view(epoch=8, generation=6, groups=(ME,)), ME, {4, 5, 6}, 5) == {6}


@given(
    generation=st.integers(0, 6), behind=st.integers(0, 6), ahead=st.integers(0, 2), known=st.sets(st.integers(1, 8)),
    in_force=st.integers(0, 6), is_in=st.booleans(), is_proposed=st.booleans(),
)  # fmt: skip
def test_whatever_the_view_says_no_generation_that_a_shard_may_use_is_dropped(
    generation: int, behind: int, ahead: int, known: set[int], in_force: int, is_in: bool, is_proposed: bool
) -> None:
    oldest = max(0, generation - behind)
    seen = view(
        generation=generation, groups=(ME,) if is_in else (), proposed=generation + ahead if ahead else 0,
        proposed_groups=(ME,) if is_proposed else (), oldest=oldest,
    )  # fmt: skip
    wanted = wanted_generations(seen, ME, known, in_force)
    assert {number for number in known if oldest <= number <= generation} <= wanted
    assert set(generations_of(seen, ME)) <= wanted
    if generation >= in_force:
        assert all(number >= oldest or number in generations_of(seen, ME) for number in wanted)


def test_the_union_of_parts_has_every_expert_once_in_order() -> None:
    parts = [
        generations.part_of(placement(1, 2), 1, LAYERS),
        generations.part_of(placement(2, 3), 1, LAYERS),
    ]
    assert union(parts) == both(2, 3, 4, 5)
    assert union([]) == {}


# --- what is done ---------------------------------------------------------------------------------------------------


async def test_a_proposal_is_loaded_then_served_then_reported_as_prepared() -> None:
    async with following(Controller(first=placement(1, 2))) as group:
        group.follower.see(view(proposed=1, proposed_groups=(OTHER, ME)))
        await group.until(lambda: group.controller.told == [1])
        assert group.shelf.held == both(3, 4, 5)
        assert group.server.history == [{1: 1}]
        group.follower.see(view(2, generation=1, groups=(OTHER, ME)))
        group.follower.see(view(3, generation=1, groups=(OTHER, ME), epoch=8))
        await asyncio.sleep(0.05)
        assert group.controller.told == [1], "said once"
        assert group.controller.asked == [1]


async def test_both_generations_are_served_until_every_shard_has_adopted_and_then_only_what_is_needed_is_held() -> None:
    async with following(Controller(first=placement(1, 2), second=placement(2, 3))) as group:
        group.follower.see(view(proposed=1, proposed_groups=(OTHER, ME)))
        await group.until(lambda: 1 in group.controller.told)
        group.follower.see(view(2, generation=1, groups=(OTHER, ME), proposed=2, proposed_groups=(OTHER, ME, THIRD)))
        await group.until(lambda: 2 in group.controller.told)
        assert group.server.positions == {1: 1, 2: 1}
        assert group.shelf.held == both(2, 3, 4, 5)
        assert group.shelf.read[6:] == [(0, 2), (1, 2)], "what is there is not read again"
        group.follower.see(view(3, generation=2, groups=(OTHER, ME, THIRD), oldest=1))
        await asyncio.sleep(0.05)
        assert group.server.positions == {1: 1, 2: 1}
        group.follower.see(view(4, generation=2, groups=(OTHER, ME, THIRD)))
        await group.until(lambda: group.server.positions == {2: 1})
        await group.until(lambda: group.shelf.held == both(2, 3))


async def test_a_group_that_is_left_out_ends_with_nothing_and_serves_nobody() -> None:
    async with following(Controller(first=placement(1, 2), second=placement(2, 1))) as group:
        group.follower.see(view(generation=1, groups=(OTHER, ME)))
        await group.until(lambda: group.server.positions == {1: 1})
        group.follower.see(view(2, generation=2, groups=(OTHER,), oldest=1))
        await asyncio.sleep(0.05)
        assert group.server.positions == {1: 1}
        group.follower.see(view(3, generation=2, groups=(OTHER,)))
        await group.until(lambda: group.shelf.held == {})
        assert group.server.positions == {}


async def test_a_newer_proposal_ends_the_load_of_the_one_before_and_what_is_served_goes_on() -> None:
    loading, go_on = threading.Event(), threading.Event()

    def slow(layer: int, expert: int) -> None:
        if expert == 0:
            loading.set()
            assert go_on.wait(60)

    controller = Controller(first=placement(1, 2), second=placement(2, 1), third=placement(3, 3))
    async with following(controller, Shelf(slow)) as group:
        group.follower.see(view(generation=1, groups=(OTHER, ME)))
        await group.until(lambda: group.server.positions == {1: 1})
        group.follower.see(view(2, generation=1, groups=(OTHER, ME), proposed=2, proposed_groups=(ME,)))
        await group.until(loading.is_set)
        group.follower.see(view(3, generation=1, groups=(OTHER, ME), proposed=3, proposed_groups=(OTHER, THIRD, ME)))
        assert group.server.positions == {1: 1}
        go_on.set()
        await group.until(lambda: controller.told == [3])
        assert group.server.history == [{1: 1}, {1: 1, 3: 2}], "the one before was never served"
        assert group.shelf.held == both(3, 4, 5), "nor is anything kept of it"
        assert len([item for item in group.shelf.read if item[1] < 3]) == 1


async def test_a_view_that_asks_for_the_same_does_not_disturb_a_load() -> None:
    loading, go_on = threading.Event(), threading.Event()

    def slow(layer: int, expert: int) -> None:
        loading.set()
        assert go_on.wait(60)

    async with following(Controller(first=placement(1, 2)), Shelf(slow)) as group:
        group.follower.see(view(proposed=1, proposed_groups=(OTHER, ME)))
        await group.until(loading.is_set)
        for version in (2, 3):
            group.follower.see(view(version, proposed=1, proposed_groups=(OTHER, ME)))
        go_on.set()
        await group.until(lambda: group.controller.told == [1])
        assert len(group.shelf.read) == 6


async def test_a_load_that_fails_is_told_and_tried_again_while_the_rest_is_served(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(generations, "RETRY_S", 0.01)
    monkeypatch.setattr(generations, "MAX_RETRY_S", 0.05)
    attempts = 0

    def broken(layer: int, expert: int) -> None:
        nonlocal attempts
        if expert < 3:
            attempts += 1
            if attempts < 2 * generations.MAX_ATTEMPTS:
                raise ExpertError("the disk is broken")

    async with following(Controller(first=placement(1, 2), second=placement(2, 1)), Shelf(broken)) as group:
        group.follower.see(view(generation=1, groups=(OTHER, ME)))
        await group.until(lambda: group.server.positions == {1: 1})
        group.follower.see(view(2, generation=1, groups=(OTHER, ME), proposed=2, proposed_groups=(ME,)))
        await group.until(lambda: group.follower.stage == "cannot load experts: the disk is broken")
        assert group.server.positions == {1: 1}
        await group.until(lambda: group.controller.told == [2])
        await group.until(lambda: group.follower.stage == "")
        assert attempts >= 2 * generations.MAX_ATTEMPTS


async def test_a_group_that_serves_nothing_and_cannot_load_ends_with_the_reason(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(generations, "RETRY_S", 0.01)

    def broken(layer: int, expert: int) -> None:
        raise CheckpointError(checkpoint_path(), "is gone", "bring it back")

    group = Group(Controller(first=placement(1, 2)), Shelf(broken))
    group.follower.see(view(proposed=1, proposed_groups=(OTHER, ME)))
    with pytest.raises(LoadFailed, match="is gone; bring it back"):
        await asyncio.wait_for(group.follower.run(), 60)
    assert not group.server.history and not group.controller.told


async def test_a_controller_that_does_not_answer_is_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generations, "RETRY_S", 0.01)
    controller = Controller(first=placement(1, 2))
    answer, refusals = controller.placement, iter([ConnectionError("away"), ConnectionError("away")])

    async def away(generation: int) -> dict[str, Any] | None:
        for error in refusals:
            raise error
        return await answer(generation)

    controller.placement = away  # type: ignore[method-assign]
    async with following(controller) as group:
        group.follower.see(view(proposed=1, proposed_groups=(OTHER, ME)))
        await group.until(lambda: controller.told == [1])


async def test_a_proposal_that_is_gone_when_it_is_asked_for_is_not_reported() -> None:
    async with following(Controller(second=placement(2, 2))) as group:
        group.follower.see(view(proposed=1, proposed_groups=(OTHER, ME)))
        await group.until(lambda: group.controller.asked == [1])
        group.follower.see(view(2, proposed=2, proposed_groups=(OTHER, ME)))
        await group.until(lambda: group.controller.told == [2])
        assert group.server.history == [{2: 1}]


async def test_a_restarted_controller_is_told_again_what_is_prepared() -> None:
    async with following(Controller(first=placement(1, 2))) as group:
        group.follower.see(view(proposed=1, proposed_groups=(OTHER, ME)))
        await group.until(lambda: group.controller.told == [1])
        group.follower.see(view(epoch=8, proposed=1, proposed_groups=(OTHER, ME)))
        await group.until(lambda: group.controller.told == [1, 1])
        assert len(group.shelf.read) == 6


async def test_a_thread_that_loads_beside_serving_lets_others_go_first_and_no_other_does() -> None:
    niceness: list[int] = []

    def note(layer: int, expert: int) -> None:
        niceness.append(os.getpriority(os.PRIO_PROCESS, threading.get_native_id()))

    normal = os.getpriority(os.PRIO_PROCESS, 0)
    async with following(Controller(first=placement(1, 2), second=placement(2, 1)), Shelf(note)) as group:
        group.follower.see(view(generation=1, groups=(OTHER, ME)))
        await group.until(lambda: group.server.positions == {1: 1})
        group.follower.see(view(2, generation=1, groups=(OTHER, ME), proposed=2, proposed_groups=(ME,)))
        await group.until(lambda: group.controller.told == [2])
    assert niceness == [normal] * 6 + [min(19, normal + NICENESS)] * 6
    assert os.getpriority(os.PRIO_PROCESS, 0) == normal


async def test_real_experts_come_with_the_generations() -> None:
    checkpoint = Checkpoint.open(checkpoint_path())
    shape = checkpoint.shape
    placements = {
        number: contiguous(
            generation=number, num_layers=shape.num_layers, num_experts=shape.num_experts, num_groups=groups
        )
        for number, groups in ((1, 4), (2, 2))
    }
    controller, server, experts = Controller(), Server(), RoutedExperts(checkpoint)
    controller.placements = placements
    follower = GenerationFollower(ME, shape.moe_layers, experts, server, controller)
    task = asyncio.create_task(follower.run())
    async with asyncio.timeout(60):
        follower.see(view(generation=1, groups=(ME, "b", "c", "d"), proposed=2, proposed_groups=("b", ME)))
        while controller.told != [2]:
            await asyncio.sleep(0.01)
        quarter, half = placements[1].experts_of_group(0, 0), placements[2].experts_of_group(1, 0)
        assert experts.held == dict.fromkeys(shape.moe_layers, tuple(sorted({*quarter, *half})))
        follower.see(view(2, generation=2, groups=("b", ME)))
        while server.positions != {2: 1} or experts.held != dict.fromkeys(shape.moe_layers, half):
            await asyncio.sleep(0.01)
    task.cancel()
