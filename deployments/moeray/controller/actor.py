"""The controller actor: holds the membership state, forms generations, answers watchers and `moeray status`.

It is never in the way of a token: shards and groups talk to each other directly, and go on when it is away.
"""

from __future__ import annotations

import asyncio
import logging
import os
import secrets
from collections.abc import Callable
from typing import Any

import ray

from moeray.controller.lease import LeaseServer
from moeray.controller.settings import CONTROLLER_NAME, NAMESPACE, ControllerSettings
from moeray.membership import Membership, MemberState, Role, View
from moeray.placement import CoreShare, Machine, Placement, Wanted, crowded, take_cores

logger = logging.getLogger(__name__)


class Controller:
    """See module docstring. All methods run on one event loop; the state changes only in `_apply`."""

    def __init__(self, settings: ControllerSettings) -> None:
        self._settings = settings
        self._state = Membership.start(settings.num_groups, epoch=secrets.randbits(62) + 1)
        self._changed = asyncio.Event()
        self._reports: dict[str, dict[str, Any]] = {}
        self._cores: dict[str, CoreShare] = {}
        self._crowding: list[str] = []
        self._leases = LeaseServer(self._lost, silence_s=settings.silence_s)
        self._lease_address: asyncio.Task[str] | None = None

    async def join(
        self, role: str, id: str, pid: int, node: str, index: int | None = None, generation: int = 0
    ) -> dict[str, Any]:
        """Take a member in, see Membership.join; returns its index, and where and how often to beat."""
        if self._lease_address is None:
            self._lease_address = asyncio.create_task(self._leases.start(ray.util.get_node_ip_address()))
        lease_address = await self._lease_address
        self._apply(
            lambda state: state.join(id=id, role=Role(role), pid=pid, node=node, index=index, generation=generation)
        )
        logger.info("%s %s joined as number %d", role, id, self._state.members[id].index)
        token = secrets.token_hex(16)
        self._leases.expect(token, id)
        return {
            "lease_token": token,
            "index": self._state.members[id].index,
            "lease_address": lease_address,
            "beat_s": self._settings.beat_s,
        }

    async def take_cores(self, id: str, machine: Machine, wanted: Wanted) -> CoreShare:
        """Cores for a member's compute threads, beside those of the living members on its machine."""
        others = [share for other, share in self._cores.items() if other != id]
        share = take_cores(machine, wanted, others)
        await self.keep_cores(id, share)
        return share

    async def keep_cores(self, id: str, share: CoreShare) -> None:
        """A member has these cores: it was given them now, or by this controller's predecessor."""
        if id not in self._state.members:
            return
        self._cores[id] = share
        logger.info("%s runs on cores %s", share.name, share.cores)
        self._warn_of_crowding()

    async def identify(self, id: str, identity: dict[str, Any]) -> None:
        """A member has loaded its part of this model, see Membership.identify."""
        self._apply(lambda state: state.identify(id, identity))

    async def ready(self, id: str, address: str) -> None:
        self._apply(lambda state: state.ready(id, address))

    async def unready(self, id: str) -> None:
        self._apply(lambda state: state.unready(id))

    async def lose(self, id: str, reason: str) -> None:
        self._lost(id, reason)

    async def leave(self, id: str) -> None:
        self._reports.pop(id, None)
        self._apply(lambda state: state.forget(id))

    async def report(self, id: str, report: dict[str, Any]) -> None:
        """Facts a member publishes about itself (load per expert, endpoints, engine pid); replaces its last report."""
        self._reports[id] = report

    async def watch(self, epoch: int, version: int, timeout_s: float) -> View:
        """The view once it is not that of `epoch` and `version`, or after timeout_s."""
        deadline = asyncio.get_running_loop().time() + timeout_s
        while (self._state.epoch, self._state.version) == (epoch, version):
            changed, left = self._changed, deadline - asyncio.get_running_loop().time()
            if left <= 0:
                break
            try:
                await asyncio.wait_for(changed.wait(), left)
            except TimeoutError:
                break
        return self._state.view()

    async def placement(self) -> dict[str, Any]:
        """The current generation's expert map, as JSON."""
        return self._placement().to_json()

    async def state(self) -> dict[str, Any]:
        """What `moeray status --json` prints, plus the generation's completeness."""
        mismatches = self._state.mismatches()
        members = sorted(self._state.members.values(), key=lambda member: (member.role, member.index, member.id))
        return {
            "generation": self._state.generation,
            "model": self._settings.model,
            "is_complete": self._state.is_complete,
            "endpoints": self._endpoints(),
            "mismatches": list(mismatches.values()),
            "warnings": self._crowding,
            "processes": [
                {"role": Role.CONTROLLER, "id": CONTROLLER_NAME, "pid": os.getpid(), "node": _node_id(),
                 "state": MemberState.READY},
                *(
                    {"role": member.role, "id": member.id, "pid": member.pid, "node": member.node,
                     "state": member.state, "index": member.index,
                     **({"address": member.address} if member.address else {}),
                     **({"reason": member.reason} if member.reason else {}),
                     **({"mismatch": mismatches[member.id]} if member.id in mismatches else {}),
                     **self._reports.get(member.id, {})}
                    for member in members
                ),
            ],
        }  # fmt: skip

    def _free_cores(self) -> None:
        """Those of members that are gone."""
        members = self._state.members
        kept = {id: share for id, share in self._cores.items() if id in members and members[id].is_alive}
        if len(kept) < len(self._cores):
            self._cores = kept
            self._warn_of_crowding()

    def _warn_of_crowding(self) -> None:
        before, self._crowding = self._crowding, crowded(self._cores.values())
        for text in self._crowding:
            if text not in before:
                logger.warning("%s", text)

    def _placement(self) -> Placement:
        return self._settings.placement(self._state.generation)

    def _endpoints(self) -> dict[str, str]:
        for member in self._state.members.values():
            if member.role is Role.INGRESS and member.is_alive and "endpoints" in self._reports.get(member.id, {}):
                endpoints: dict[str, str] = self._reports[member.id]["endpoints"]
                return endpoints
        return {}

    def _lost(self, id: str, reason: str) -> None:
        if id in self._state.members:
            logger.warning("%s lost: %s", id, reason)
        self._apply(lambda state: state.lose(id, reason))

    def _apply(self, event: Callable[[Membership], Membership]) -> None:
        before, self._state = self._state, event(self._state)
        mismatches, known = self._state.mismatches(), before.mismatches()
        for id, difference in mismatches.items():
            if known.get(id) != difference:
                logger.error("no generation with %s: %s", id, difference)
        if self._state.generation != before.generation:
            logger.info(
                "generation %d formed: %s", self._state.generation, ", ".join(self._state.groups) or "no groups"
            )
        if self._state.version != before.version:
            self._reports = {id: report for id, report in self._reports.items() if id in self._state.members}
            self._free_cores()
            self._changed.set()
            self._changed = asyncio.Event()


def _node_id() -> str:
    node: str = ray.get_runtime_context().get_node_id()
    return node


def controller(settings: ControllerSettings | None = None) -> Any:
    """The cluster's controller actor; created if absent when `settings` are given.

    Raises:
        ValueError: there is none and no settings were given.
    """
    if settings is None:
        return ray.get_actor(CONTROLLER_NAME, namespace=NAMESPACE)
    actor = ray.remote(num_cpus=0, max_restarts=-1, max_concurrency=1000)(Controller)
    return actor.options(name=CONTROLLER_NAME, namespace=NAMESPACE, lifetime="detached", get_if_exists=True).remote(
        settings
    )
