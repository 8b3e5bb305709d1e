"""The replica's part: it brings its engine to every generation, and ends where it can only wait for ever."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from moeray.attention_shard import replica
from moeray.attention_shard.replica import AttentionShard
from moeray.config import parse_config
from moeray.controller.settings import controller_settings
from moeray.deepseek_v4.checkpoint import Checkpoint
from moeray.membership import MembershipError
from moeray.tiny import checkpoint_path

HANG_S = 5.0


class Exited(BaseException):
    """In place of the end of this process."""


class Shard(AttentionShard):
    """One whose engine is ready."""

    def __init__(self, member: Any) -> None:
        self._member, self._is_ready, self._lost, self._stage = member, False, "", "starting"

    async def _connect(self, view: Any) -> bool:
        return True

    def __del__(self) -> None:  # type: ignore[override]
        """Serve awaits it; the garbage collector would not."""


@pytest.fixture(autouse=True)
def _alone(monkeypatch: pytest.MonkeyPatch) -> None:
    def end(reason: str) -> None:
        raise Exited(reason)

    monkeypatch.setattr(replica, "_exit", end)
    monkeypatch.setattr(replica, "RETRY_S", 0.01)


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(60):
        while not condition():
            await asyncio.sleep(0.01)


async def test_a_shard_whose_calls_wait_ends_once_it_has_had_no_lease_for_as_long() -> None:
    member, child = SimpleNamespace(alone_s=2 * HANG_S), SimpleNamespace(waits_s=2 * HANG_S)
    with pytest.raises(Exited, match=r"no lease of the controller for 10 s, .* waits for experts since 10 s"):
        await Shard(member)._end_if_stranded(child, HANG_S)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("alone_s", "waits_s"),
    [(1000.0, 0.0), (1000.0, HANG_S - 1), (0.0, 1000.0), (HANG_S - 1, 1000.0)],
    ids=["serves without a lease", "waits shortly", "has a lease", "controller restarts"],
)
async def test_no_other_shard_ends(alone_s: float, waits_s: float) -> None:
    watching = asyncio.create_task(
        Shard(SimpleNamespace(alone_s=alone_s))._end_if_stranded(SimpleNamespace(waits_s=waits_s), HANG_S)  # type: ignore[arg-type]
    )
    await asyncio.sleep(0.1)
    assert not watching.done()
    watching.cancel()


class Refusing:
    """A controller that does not know this shard (any more), for so many calls."""

    def __init__(self, refusals: int) -> None:
        self.refusals, self.ready_at = refusals, ""

    async def adopted(self, generation: int) -> None:
        pass

    async def ready(self, address: str) -> None:
        self._refuse()
        self.ready_at = address

    async def unready(self) -> None:
        self._refuse()
        self.ready_at = ""

    def _refuse(self) -> None:
        if self.refusals:
            self.refusals -= 1
            raise MembershipError("me is not a member: lost, silent for 30 s")


async def test_a_shard_that_the_controller_does_not_know_says_that_it_is_ready_until_it_does() -> None:
    member = Refusing(refusals=2)
    shard = Shard(member)
    moving = asyncio.create_task(shard._move(SimpleNamespace(address="a:1"), SimpleNamespace(generation=1)))  # type: ignore[arg-type]
    await until(lambda: member.ready_at == "a:1" or moving.done())
    await moving
    assert shard._is_ready


async def test_a_shard_that_is_told_to_go_ends_also_where_it_cannot_leave_in_order(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def end(_: int) -> None:
        raise Exited

    async def fail() -> None:
        raise RuntimeError("the shard process does not answer")

    shard = Shard(SimpleNamespace())
    monkeypatch.setattr(shard, "_stop", fail)
    monkeypatch.setattr(replica.os, "_exit", end)
    with pytest.raises(Exited):
        await shard._go()


async def test_a_shard_that_could_not_say_that_it_is_not_ready_says_it_with_the_next_view() -> None:
    member = Refusing(refusals=0)
    shard = Shard(member)
    await shard._move(SimpleNamespace(address="a:1"), SimpleNamespace(generation=1))  # type: ignore[arg-type]
    member.refusals = 1
    with pytest.raises(MembershipError):
        await shard._unready()
    await shard._unready()
    assert member.ready_at == ""


def test_a_shard_process_is_told_the_limits_of_the_configuration(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replica.ray.util, "get_node_ip_address", lambda: "127.0.0.1")
    config = parse_config(
        {"health": {"hang_s": 7, "step_s": 77}, "transport": {"timeout_s": 17}, "experts": {"wait_s": 27}}
    )
    settings = controller_settings(config, Checkpoint.open(checkpoint_path()).shape)
    spec, _ = replica._spec(config, checkpoint_path(), settings, 0, None, 0.0)
    moeray = spec.engine["moeray"]
    assert (spec.hang_s, spec.step_s, moeray["timeout_s"], moeray["wait_s"]) == (7, 77, 17, 27)
