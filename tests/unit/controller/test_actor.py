"""The controller as its members see it, without Ray: joins, identities, views, and what people are shown."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest
import ray

from moeray.cli.progress import news
from moeray.cli.status import render
from moeray.controller import actor
from moeray.controller.actor import Controller
from moeray.controller.lease import Lease
from moeray.controller.settings import ControllerSettings
from moeray.controller.store import Store, StoreError
from moeray.membership import Charge, Delays, MembershipError, View
from moeray.membership.snapshot import to_json
from moeray.placement import Cpu, Layout, Machine, Wanted

ONE = {"fingerprint": "abc", "rows_version": 1}
OTHER = {"fingerprint": "def", "rows_version": 1}
SETTINGS = ControllerSettings(
    model="m", num_groups=2, layout=Layout(num_layers=3, num_experts=8, num_redundant=8, min_copies=2)
)


class Cluster:
    """A controller and the leases of its members."""

    def __init__(self, settings: ControllerSettings = SETTINGS, store: Store | None = None) -> None:
        self.controller = Controller(settings, store)
        self.leases: list[Lease] = []

    async def join(self, role: str, id: str, **more: Any) -> None:
        given = await self.controller.join(role, id, pid=len(self.leases), node=f"node-of-{id}", **more)
        beats = {key: given[key] for key in ("beat_s", "silence_s")}
        self.leases.append(Lease(given["lease_address"], given["lease_token"], **beats))
        await self.leases[-1].start()

    async def group(self, id: str, identity: dict[str, Any]) -> None:
        await self.join("expert_group", id)
        await self.controller.identify(id, identity)
        await self.controller.ready(id, f"{id}:1")

    async def prepared(self, *ids: str) -> None:
        """These groups have loaded what is proposed."""
        number = (await self.view()).proposed
        for id in ids:
            await self.controller.prepared(id, number)

    async def view(self) -> View:
        return await self.controller.watch(0, -1, 0.0)

    async def formed(self) -> None:
        await self.shard("s0", ONE)
        await self.group("g0", ONE)
        await self.group("g1", ONE)
        await self.prepared("g0", "g1")
        await self.controller.adopted("s0", 1)

    async def close(self) -> None:
        for lease in self.leases:
            lease.close()
        for task in self.controller._tasks:
            task.cancel()
        await self.controller._leases.close()

    async def shard(self, id: str, identity: dict[str, Any]) -> None:
        await self.join("attention_shard", id)
        await self.controller.identify(id, identity)


class Memory:
    """A store in this process, which can be out of order."""

    def __init__(self) -> None:
        self.text: str | None = None
        self.num_saved = 0
        self.is_broken = False

    def load(self) -> str | None:
        return self.text

    def save(self, text: str) -> None:
        if self.is_broken:
            raise StoreError("broken")
        self.text, self.num_saved = text, self.num_saved + 1

    def delete(self) -> None:
        self.text = None


@pytest.fixture(autouse=True)
def _without_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray.util, "get_node_ip_address", lambda: "127.0.0.1")
    monkeypatch.setattr(actor, "_node_id", lambda: "node")


@pytest.fixture
async def cluster() -> AsyncIterator[Cluster]:
    cluster = Cluster()
    yield cluster
    await cluster.close()


async def until(holds: Callable[[], bool]) -> None:
    async with asyncio.timeout(60):
        while not holds():
            await asyncio.sleep(0.02)


async def test_a_shard_and_a_group_of_other_weights_form_no_generation_and_people_see_both_sides(
    cluster: Cluster,
) -> None:
    await cluster.shard("s0", OTHER)
    await cluster.group("g0", ONE)
    await cluster.group("g1", ONE)
    state = await cluster.controller.state()
    assert (state["generation"], state["is_complete"]) == (0, False)
    text = (
        "attention shard 0 (node node-of-, pid 0) has fingerprint 'def'; "
        "expert group 0 (node node-of-, pid 1) has fingerprint 'abc'"
    )
    assert state["mismatches"] == [text]
    assert [process["id"] for process in state["processes"] if "mismatch" in process] == ["s0"]
    assert any(line.startswith(text) for line in news(state, {}))
    assert f"not the same model: {text}" in render(state)
    view = await cluster.controller.watch(0, -1, 0.0)
    assert (view.is_complete, dict(view.mismatches)) == (False, {"s0": text})


async def test_watchers_are_told_when_the_odd_one_is_gone_and_the_generation_forms(cluster: Cluster) -> None:
    await cluster.shard("s0", OTHER)
    await cluster.shard("s1", ONE)
    await cluster.group("g0", ONE)
    await cluster.group("g1", ONE)
    view = await cluster.controller.watch(0, -1, 0.0)
    assert view.generation == 0
    watching = asyncio.create_task(cluster.controller.watch(view.epoch, view.version, 60.0))
    await cluster.controller.leave("s0")
    view = await asyncio.wait_for(watching, 60)
    assert (view.generation, view.proposed, view.proposed_groups, dict(view.mismatches)) == (0, 1, ("g0", "g1"), {})
    assert await cluster.controller.placement(0) is None
    placement = await cluster.controller.placement(1)
    assert placement is not None and (placement["generation"], sum(placement["slots_per_group"])) == (1, 8 + 8)
    await cluster.prepared("g0")
    shown = await cluster.controller.state()
    assert shown["proposed"] == {"generation": 1, "groups": ["g0", "g1"], "waits_for": ["g1"]}
    assert "(generation 1 with 2 groups is being prepared: 1 of them load experts)" in render(shown)
    await cluster.prepared("g1")
    assert ((await cluster.view()).generation, (await cluster.view()).is_complete) == (1, True)


async def test_copies_that_are_left_are_shown(cluster: Cluster) -> None:
    await cluster.formed()
    state = await cluster.controller.state()
    assert state["copies"] == {"slots": 16, "fewest": 2, "fewest_living": 2, "experts_lost": 0}
    assert "generation 1, at least 2 of 2 copies of each expert" in render(state)
    await cluster.controller.accuse("s0", "g0", "garbage", Charge.BAD)
    state = await cluster.controller.state()
    assert (state["is_complete"], state["is_covered"], state["copies"]["fewest_living"]) == (False, True, 1)
    assert "(an expert group is missing; the others have its experts)" in render(state)
    await cluster.controller.lose("g1", "killed")
    text = render(await cluster.controller.state())
    assert "at least 0 of 2 copies of each expert (24 experts are nowhere: their requests wait)" in text


async def test_deadlines_of_the_membership_are_noticed_without_any_event() -> None:
    delays = Delays(join_debounce_s=0.3, regroup_s=60.0)
    cluster = Cluster(dataclasses.replace(SETTINGS, delays=delays))
    await cluster.formed()
    await cluster.group("g2", ONE)
    view = await cluster.view()
    while not view.proposed:
        view = await asyncio.wait_for(cluster.controller.watch(view.epoch, view.version, 60.0), 60)
    assert view.proposed_groups == ("g0", "g1", "g2")
    await cluster.close()


async def test_scaling_is_refused_with_the_reason(cluster: Cluster) -> None:
    await cluster.controller.scale("attention_shard", 9)
    with pytest.raises(MembershipError, match="1 expert groups cannot hold 2 copies"):
        await cluster.controller.scale("expert_group", 1)
    await cluster.controller.scale("expert_group", 3)
    assert (await cluster.controller.state())["target_groups"] == 3


async def test_a_restarted_controller_publishes_what_was_in_force_and_takes_its_members_back() -> None:
    store = Memory()
    cluster = Cluster(store=store)
    await cluster.formed()
    before = await cluster.view()
    await until(lambda: store.text == to_json(cluster.controller._state))
    successor = Cluster(store=store)
    view = await successor.view()
    assert (view.generation, view.groups, view.addresses) == (1, before.groups, before.addresses)
    assert view.epoch != before.epoch
    for id, role in (("g0", "expert_group"), ("g1", "expert_group"), ("s0", "attention_shard")):
        index = cluster.controller._state.members[id].index
        await successor.join(role, id, index=index, generation=1, heard=1)
    assert successor.controller._state.awaited == frozenset()
    assert (await successor.view()).is_complete
    await cluster.close()
    await successor.close()


async def test_a_store_that_was_set_back_gives_out_no_number_again() -> None:
    store = Memory()
    cluster = Cluster(store=store)
    await cluster.formed()
    await until(lambda: store.text == to_json(cluster.controller._state))
    await cluster.close()
    successor = Cluster(store=store)  # knows of generation 1; its members have come to 3, and have heard of 4
    for id, role in (("g0", "expert_group"), ("g1", "expert_group"), ("s0", "attention_shard")):
        index = successor.controller._state.members[id].index
        await successor.join(role, id, index=index, generation=3, heard=4)
    await until(lambda: successor.controller._state.proposal is not None)
    assert successor.controller._state.proposal.number == 5
    await successor.close()


async def test_members_that_do_not_come_back_to_a_restarted_controller_are_lost() -> None:
    store = Memory()
    cluster = Cluster(store=store)
    await cluster.formed()
    await until(lambda: store.text == to_json(cluster.controller._state))
    await cluster.close()
    successor = Cluster(dataclasses.replace(SETTINGS, hang_s=0.1), store)
    await successor.join("attention_shard", "s0", index=0, generation=1)
    await until(lambda: not successor.controller._state.awaited)
    view = await successor.view()
    assert (view.is_complete, view.missing[0]) == (
        False, "expert group 0 (did not come back to the restarted controller)",
    )  # fmt: skip
    await successor.close()


async def test_a_broken_store_holds_nothing_up_and_gets_the_newest_state_when_it_is_back() -> None:
    store = Memory()
    store.is_broken = True
    cluster = Cluster(store=store)
    await cluster.formed()
    assert ((await cluster.view()).generation, store.text) == (1, None)
    store.is_broken = False
    await until(lambda: store.text == to_json(cluster.controller._state))
    await cluster.close()


async def test_what_is_not_worth_remembering_is_not_written() -> None:
    store = Memory()
    cluster = Cluster(store=store)
    await cluster.formed()
    await until(lambda: store.text == to_json(cluster.controller._state))
    num_saved = store.num_saved
    for _ in range(5):
        await cluster.controller.adopted("s0", 1)
        await cluster.controller.prepared("g0", 1)
        await asyncio.sleep(0.05)
    assert store.num_saved == num_saved
    await cluster.close()


async def test_a_cluster_that_is_taken_down_leaves_nothing_behind() -> None:
    store = Memory()
    cluster = Cluster(store=store)
    await cluster.formed()
    await until(lambda: store.text is not None)
    await cluster.controller.retire()
    await cluster.controller.unready("s0")
    await asyncio.sleep(0.1)
    assert store.text is None
    await cluster.close()


async def test_a_snapshot_that_cannot_be_read_is_reported_and_begun_anew(caplog: pytest.LogCaptureFixture) -> None:
    store = Memory()
    store.text = "{"
    cluster = Cluster(store=store)
    assert (await cluster.view()).generation == 0
    assert "beginning anew: the controller's snapshot cannot be read" in caplog.text


async def test_members_that_share_a_core_are_shown_until_one_of_them_is_gone(cluster: Cluster) -> None:
    machine = Machine("m", (Cpu(0, 0), Cpu(1, 1)))
    shares = []
    for index, id in enumerate(("s0", "g0", "g1")):
        await cluster.join("attention_shard" if index == 0 else "expert_group", id)
        wanted = Wanted(id, id[0], "node", 1)
        shares.append(await cluster.controller.take_cores(id, machine, wanted))
    assert [share.cores for share in shares] == [[0], [1], [0]]
    state = await cluster.controller.state()
    assert "core 0: s0, g1" in state["warnings"][0]
    assert f"warning: {state['warnings'][0]}" in render(state)
    await cluster.controller.lose("g1", "killed")
    assert (await cluster.controller.state())["warnings"] == []


async def test_a_restarted_controller_leaves_the_members_their_cores(cluster: Cluster) -> None:
    machine = Machine("m", (Cpu(0, 0), Cpu(1, 1)))
    await cluster.join("attention_shard", "s0")
    had = await cluster.controller.take_cores("s0", machine, Wanted("s0", "s", "node", 1))
    successor = Controller(SETTINGS)
    await successor.join("attention_shard", "s0", pid=0, node="n", index=0)
    await successor.keep_cores("s0", had)
    await successor.join("expert_group", "g0", pid=1, node="n")
    assert (await successor.take_cores("g0", machine, Wanted("g0", "g", "node", 1))).cores == [1]
    await successor._leases.close()
