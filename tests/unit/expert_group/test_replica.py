"""The replica's part: it joins before it loads, leaves in order, and ends at once when it is given up."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from moeray.config import parse_config
from moeray.deepseek_v4 import scrubber
from moeray.expert_group import replica
from moeray.expert_group.replica import ExpertGroup
from moeray.membership import MembershipError, Role, View
from moeray.placement import contiguous

MODEL = "moeray-tiny"
EMPTY = View(
    epoch=1, version=1, generation=0, groups=(), addresses=(), is_complete=False, is_covered=False, missing=(),
    proposed=0, proposed_groups=(), oldest=0, lost=frozenset(), draining=frozenset(), may_leave=frozenset(),
    shards={}, row_servers={}, mismatches={},
)  # fmt: skip


class Exited(BaseException):
    """In place of the end of this process."""


class Member:
    """In place of `ClusterMember`: notes what it is told, in order."""

    id = "me"
    last: Member

    def __init__(self, role: Role, _: object) -> None:
        assert role is Role.EXPERT_GROUP
        self.told: list[str] = []
        Member.last = self

    async def join(self) -> int:
        self.told.append("join")
        return 0

    def every(self, _: float, publish: Callable[[], Awaitable[dict[str, Any]]]) -> None:
        self.report = publish

    async def identify(self, identity: dict[str, Any]) -> None:
        self.told.append("identify")
        self.identity = identity

    async def ready(self, address: str) -> None:
        self.told.append("ready")

    def follow(self, on_view: Callable[[View], Awaitable[None]], on_told_to_go: Callable[[], Awaitable[None]]) -> None:
        self.on_view, self.on_told_to_go = on_view, on_told_to_go

    async def placement(self, generation: int) -> dict[str, Any] | None:
        return contiguous(generation=generation, num_layers=4, num_experts=16, num_groups=2).to_json()

    async def prepared(self, generation: int) -> None:
        self.told.append(f"prepared {generation}")

    async def drain(self) -> None:
        self.told.append("drain")

    async def leave(self) -> None:
        self.told.append("leave")

    async def lost(self, reason: str) -> None:
        self.told.append(f"lost: {reason}")

    def cores(self) -> dict[str, Any]:
        return {}


class Group(ExpertGroup):
    def __del__(self) -> None:  # type: ignore[override]
        """Serve awaits it; the garbage collector would not."""


@pytest.fixture(autouse=True)
def _alone(monkeypatch: pytest.MonkeyPatch) -> None:
    def end(reason: str) -> None:
        raise Exited(reason)

    monkeypatch.setattr(replica, "ClusterMember", Member)
    monkeypatch.setattr(replica, "_exit", end)
    monkeypatch.setattr(replica.ray.util, "get_node_ip_address", lambda: "127.0.0.1")


@asynccontextmanager
async def running() -> AsyncIterator[tuple[Group, Member]]:
    group = Group.__new__(Group)
    await group.__init__(parse_config({"pin_cores": False}), MODEL, SimpleNamespace())  # type: ignore[misc, arg-type]
    yield group, Member.last
    if Member.last.told[-1] != "leave":
        await Member.last.on_view(replace(EMPTY, may_leave=frozenset({"me"})))
        await group._stop()


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(60):
        while not condition():
            await asyncio.sleep(0.01)


async def test_it_is_ready_with_nothing_loaded_and_loads_what_is_proposed() -> None:
    async with running() as (_, member):
        assert member.told == ["join", "identify", "ready"]
        assert len(member.identity["fingerprint"]) == 32
        report = await member.report()
        assert (report["experts"]["num_experts"], report["experts"]["bytes"], report["experts"]["held"]) == (0, 0, {})
        await member.on_view(replace(EMPTY, proposed=1, proposed_groups=("me", "other")))
        await until(lambda: "prepared 1" in member.told)
        report = await member.report()
        assert report["experts"]["held"] == {layer: tuple(range(8)) for layer in range(4)}
        assert report["experts"]["generations"] == {1: 0}
        assert "stage" not in report


async def test_a_group_that_is_given_up_ends_at_once() -> None:
    async with running() as (_, member):
        with pytest.raises(Exited, match="given it up"):
            await member.on_view(replace(EMPTY, lost=frozenset({"me", "another"})))
        await member.on_view(replace(EMPTY, lost=frozenset({"another"})))


async def test_a_group_that_is_to_stop_serves_until_no_shard_needs_it() -> None:
    async with running() as (group, member):
        in_force = replace(EMPTY, generation=1, groups=("me", "other"), oldest=1)
        await member.on_view(in_force)
        await until(lambda: group._follower is not None and 1 in group._follower.parts)
        stopping = asyncio.create_task(group._stop())
        await until(lambda: member.told[-1] == "drain")
        await member.on_view(replace(in_force, version=2))
        await asyncio.sleep(0.1)
        assert member.told[-1] == "drain" and not stopping.done()
        assert group._computation is not None and group._computation.server._positions == {1: 0}
        await member.on_view(replace(in_force, version=3, generation=2, groups=("other",), may_leave=frozenset({"me"})))
        await asyncio.wait_for(stopping, 60)
        assert member.told[-2:] == ["drain", "leave"]


async def test_a_group_that_cannot_load_tells_why_and_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    ended: list[str] = []
    monkeypatch.setattr(replica, "_exit", ended.append)
    async with running() as (group, member):
        assert group._follower is not None

        async def fail() -> None:
            raise replica.LoadFailed("the disk is broken")

        monkeypatch.setattr(group._follower, "run", fail)
        await group._follow_generations(group._follower)
        assert member.told[-1] == "lost: the disk is broken"
        assert ended == ["the disk is broken"]


async def test_a_group_that_the_controller_does_not_know_ends_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    async with running() as (group, member):

        async def refuse(_: str) -> None:
            raise MembershipError("me is not a member")

        monkeypatch.setattr(member, "lost", refuse)
        with pytest.raises(Exited, match="the disk is broken"):
            await group._give_up("the disk is broken")


async def test_a_group_whose_weights_changed_in_memory_tells_which_and_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    ended: list[str] = []
    monkeypatch.setattr(replica, "_exit", ended.append)
    monkeypatch.setattr(
        replica, "_scrubber", lambda found, told: scrubber.Scrubber(found.experts.scrub, told, round_s=0)
    )
    async with running() as (group, member):
        await member.on_view(replace(EMPTY, generation=1, groups=("me", "other")))
        await until(lambda: group._follower is not None and 1 in group._follower.parts)
        assert group._computation is not None and not ended
        store: Any = group._computation.experts._store
        store._layers[2].experts[3].w2[0, 5] ^= 1
        await until(lambda: bool(ended))
        assert ended == ["expert 3 of layer 2 has changed in memory since it was loaded"]
        assert member.told[-1] == f"lost: {ended[0]}"
