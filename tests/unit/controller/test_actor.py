"""The controller as its members see it, without Ray: joins, identities, views, and what people are shown."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest
import ray

from moeray.cli.progress import _news
from moeray.cli.status import render
from moeray.controller import actor
from moeray.controller.actor import Controller
from moeray.controller.lease import Lease
from moeray.controller.settings import ControllerSettings
from moeray.placement import Cpu, Machine, Wanted

ONE = {"fingerprint": "abc", "moeray_version": "1"}
OTHER = {"fingerprint": "def", "moeray_version": "1"}
SETTINGS = ControllerSettings(model="m", num_groups=2, num_layers=3, num_experts=8, num_redundant=3)


class Cluster:
    """A controller and the leases of its members."""

    def __init__(self) -> None:
        self.controller = Controller(SETTINGS)
        self.leases: list[Lease] = []

    async def join(self, role: str, id: str, **more: Any) -> None:
        given = await self.controller.join(role, id, pid=len(self.leases), node=f"node-of-{id}", **more)
        self.leases.append(Lease(given["lease_address"], given["lease_token"], beat_s=given["beat_s"]))
        await self.leases[-1].start()

    async def group(self, id: str, identity: dict[str, Any]) -> None:
        await self.join("expert_group", id)
        await self.controller.identify(id, identity)
        await self.controller.ready(id, f"{id}:1")

    async def shard(self, id: str, identity: dict[str, Any]) -> None:
        await self.join("attention_shard", id)
        await self.controller.identify(id, identity)


@pytest.fixture
async def cluster(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Cluster]:
    monkeypatch.setattr(ray.util, "get_node_ip_address", lambda: "127.0.0.1")
    monkeypatch.setattr(actor, "_node_id", lambda: "node")
    cluster = Cluster()
    yield cluster
    for lease in cluster.leases:
        lease.close()
    await cluster.controller._leases.close()


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
    assert any(line.startswith(text) for line in _news(state, {}))
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
    assert (view.generation, view.is_complete, dict(view.mismatches)) == (1, True, {})
    placement = await cluster.controller.placement()
    assert (placement["generation"], sum(placement["slots_per_group"])) == (1, 8 + 3)


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
