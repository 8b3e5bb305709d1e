"""What the controller counts, and how an ingress shows it."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
import ray

from moeray.controller import mirror as mirror_module
from moeray.controller.actor import Controller
from moeray.controller.mirror import ControllerMirror
from moeray.controller.settings import ControllerSettings
from moeray.membership import Role
from moeray.placement import Layout


def scaling(count: int, cause: str = "") -> dict[str, dict[str, Any]]:
    return {"attention": {"count": count, "reason": "because", "cause": cause}}


async def shown(controller: Controller) -> dict[tuple[str, ...], float]:
    return {(each.family.name, *each.labels): each.value for each in await controller.samples()}


@pytest.fixture
async def controller(monkeypatch: pytest.MonkeyPatch) -> Controller:
    monkeypatch.setattr(ray.util, "get_node_ip_address", lambda: "127.0.0.1")
    made = Controller(ControllerSettings("m", 1, Layout(1, 4)))
    await made.join(Role.EXPERT_GROUP, "g0", 1, "node")
    await made.join(Role.ATTENTION_SHARD, "s0", 2, "node")
    await made.ready("s0", "a:1")
    return made


async def test_members_generations_and_losses(controller: Controller) -> None:
    before = await shown(controller)
    assert (before["moeray_generation",], before["moeray_losses_total", "expert_group"]) == (0, 0)
    for member, address in (("s0", "a:1"), ("g0", "b:1")):
        await controller.identify(member, {})
        await controller.ready(member, address)
    await controller.prepared("g0", 1)
    now = await shown(controller)
    assert now["moeray_members", "expert_group", "ready"] == 1
    assert (now["moeray_generation",], now["moeray_generations_total",], now["moeray_generation_covered",]) == (1, 1, 1)
    for _ in range(2):  # by its lease, and by who noticed it
        await controller.lose("g0", "killed")
    after = await shown(controller)
    assert after["moeray_losses_total", "expert_group"] == 1
    assert (after["moeray_generation_complete",], after["moeray_experts_lost",]) == (0, 4)
    assert after["moeray_pool_wanted", "experts"] == 1


async def test_scaling_decisions_are_counted_with_their_cause(controller: Controller) -> None:
    for decision in (scaling(1), scaling(3, "tokens"), scaling(3, "tokens"), scaling(2, "kv"), scaling(4)):
        await controller.note_scaling(decision)
    found = {labels: value for (name, *labels), value in (await shown(controller)).items() if "scaling" in name
             for labels in [tuple(labels)]}  # fmt: skip
    assert found == {
        ("attention", "up", "tokens"): 1, ("attention", "down", "kv"): 1, ("attention", "up", "operator"): 1,
    }  # fmt: skip
    assert (await shown(controller))["moeray_pool_wanted", "attention"] == 4


class Actor:
    """A controller's handle; `is_away` while it is started again."""

    def __init__(self, controller: Controller) -> None:
        self.controller, self.is_away = controller, False

    @property
    def samples(self) -> Any:
        return self

    async def remote(self) -> Any:
        if self.is_away:
            raise ray.exceptions.ActorUnavailableError("it is started again", None)
        return await self.controller.samples()


async def test_an_ingress_shows_what_a_controller_says_while_it_is_not_old(
    controller: Controller, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mirror_module, "ASK_S", 0.01)
    monkeypatch.setattr(mirror_module, "OLD_S", 0.2)
    actor = Actor(controller)
    mirror = ControllerMirror(actor)
    assert list(mirror.samples()) == []
    task = asyncio.create_task(mirror.run())
    async with asyncio.timeout(30):
        while not list(mirror.samples()):
            await asyncio.sleep(0.01)
        actor.is_away = True
        while list(mirror.samples()):
            await asyncio.sleep(0.01)
        actor.is_away = False
        while not list(mirror.samples()):
            await asyncio.sleep(0.01)
    assert not task.done()
    task.cancel()
