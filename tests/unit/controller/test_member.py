"""A member knows how long it has had no lease, and comes back to whatever controller there is."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from types import SimpleNamespace
from typing import Any

import pytest
from ray.exceptions import ActorUnavailableError

from moeray.controller import member
from moeray.controller.actor import Controller
from moeray.controller.lease import Lease
from moeray.controller.member import ClusterMember
from moeray.controller.settings import ControllerSettings
from moeray.membership import MemberState, Role
from moeray.placement import Layout

SETTINGS = ControllerSettings(model="m", num_groups=1, layout=Layout(num_layers=1, num_experts=2), beat_s=0.05)


class Actor:
    """A controller as Ray hands it out: one that is away answers no call until another life of it is there."""

    def __init__(self) -> None:
        self.life = Controller(SETTINGS)
        self.is_there = asyncio.Event()
        self.is_there.set()
        self.unanswered = dict[str, int]()  # so many calls of this name fail

    def __getattr__(self, name: str) -> Any:
        async def call(*arguments: Any) -> Any:
            await self.is_there.wait()
            if self.unanswered.get(name):
                self.unanswered[name] -= 1
                raise ActorUnavailableError("the actor is unavailable", b"0" * 16)
            return await getattr(self.life, name)(*arguments)

        return SimpleNamespace(remote=call)

    async def go_away(self) -> None:
        self.is_there.clear()
        while not self.life._leases._writers:  # the member's connection has not been taken yet
            await asyncio.sleep(0.01)
        await self.life._leases.close()

    def come_back(self) -> None:
        self.life = Controller(SETTINGS)
        self.is_there.set()


@pytest.fixture
def actor(monkeypatch: pytest.MonkeyPatch) -> Actor:
    found = Actor()
    replica = SimpleNamespace(replica_id=SimpleNamespace(unique_id="me"))
    context = SimpleNamespace(get_node_id=lambda: "node")
    monkeypatch.setattr(member, "controller", lambda _: found)
    monkeypatch.setattr(member.serve, "get_replica_context", lambda: replica)
    monkeypatch.setattr(member.ray, "get_runtime_context", lambda: context)
    monkeypatch.setattr("moeray.controller.actor.ray.util.get_node_ip_address", lambda: "127.0.0.1")
    monkeypatch.setattr(member, "RETRY_S", 0.01)
    return found


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(60):
        while not condition():
            await asyncio.sleep(0.01)


async def test_a_member_is_alone_from_the_loss_of_its_lease_until_it_has_another(actor: Actor) -> None:
    shard = ClusterMember(Role.ATTENTION_SHARD, SETTINGS)
    await shard.join()
    assert shard.alone_s == 0
    await actor.go_away()
    await until(lambda: shard.alone_s > 0.2)
    actor.come_back()
    await until(lambda: shard.alone_s == 0)
    assert actor.life._state.members["me"].is_alive
    await shard.leave()


async def test_a_member_whose_new_lease_cannot_be_opened_tries_again(
    actor: Actor, monkeypatch: pytest.MonkeyPatch
) -> None:
    shard = ClusterMember(Role.ATTENTION_SHARD, SETTINGS)
    await shard.join()
    start: Callable[[Lease], Coroutine[Any, Any, None]] = Lease.start
    attempts = 0

    async def start_at_second(lease: Lease) -> None:
        nonlocal attempts
        attempts += 1
        if attempts == 1:
            actor.come_back()  # one that knows nobody: the first attempt counts as never made
            raise ConnectionRefusedError("the port does not answer")
        await start(lease)

    monkeypatch.setattr(Lease, "start", start_at_second)
    await actor.go_away()
    actor.come_back()
    await until(lambda: attempts == 2 and shard.alone_s == 0)
    await shard.leave()


@pytest.mark.parametrize("unanswered", ["report", "ready", "adopted", "drain"])
async def test_a_member_that_has_joined_again_says_everything_until_the_controller_has_heard_it(
    actor: Actor, unanswered: str
) -> None:
    shard = ClusterMember(Role.ATTENTION_SHARD, SETTINGS)
    await shard.join()
    await shard.report({"stage": "serving"})
    await shard.ready("10.0.0.1:1")
    shard.generation, shard._is_draining = 1, True
    await actor.go_away()
    actor.unanswered[unanswered] = 2
    actor.come_back()
    await until(
        lambda: "me" in actor.life._state.members and actor.life._state.members["me"].state is MemberState.DRAINING
    )
    told = actor.life._state.members["me"]
    assert actor.unanswered == {unanswered: 0}
    assert told.address == "10.0.0.1:1"
    assert actor.life._reports["me"]["stage"] == "serving"
    await shard.leave()


async def test_a_lease_that_is_lost_before_all_was_said_again_is_followed_by_another(actor: Actor) -> None:
    shard = ClusterMember(Role.ATTENTION_SHARD, SETTINGS)
    await shard.join()
    await shard.ready("10.0.0.1:1")
    await actor.go_away()
    actor.unanswered["ready"] = 1 << 30
    actor.come_back()
    await until(lambda: actor.unanswered["ready"] < 1 << 30)
    await actor.go_away()
    actor.unanswered.clear()
    actor.come_back()
    await until(lambda: "me" in actor.life._state.members and actor.life._state.members["me"].address != "")
    await shard.leave()
