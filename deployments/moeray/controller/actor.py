"""The controller actor: holds the membership state, forms generations, answers watchers and `moeray status`.

It is never in the way of a token: shards and groups talk to each other directly, and go on when it is away.
"""

from __future__ import annotations

import asyncio
import logging
import os
import secrets
import time
from collections.abc import Callable
from typing import Any

import ray

from moeray.controller.core_ledger import CoreLedger
from moeray.controller.keeper import Keeper
from moeray.controller.lease import LeaseServer
from moeray.controller.metrics import ControllerMetrics
from moeray.controller.rebalance import rebalance
from moeray.controller.redundancy import describe_generations
from moeray.controller.settings import CONTROLLER_NAME, NAMESPACE, ControllerSettings
from moeray.controller.store import Store, open_store
from moeray.health import guard
from moeray.membership import Charge, Membership, MemberState, Role, SnapshotError, View
from moeray.membership.snapshot import from_json
from moeray.mutual_tls import ClusterCertificate
from moeray.placement import CoreShare, Machine, Placement, Wanted
from moeray.telemetry import Sample

logger = logging.getLogger(__name__)

TICK_S = 0.2
"""How late a deadline of the membership may be noticed."""


class Controller:
    """See module docstring. All methods run on one event loop; the state changes only in `_apply`."""

    def __init__(self, settings: ControllerSettings, store: Store | None = None) -> None:
        """With a store: go on from what it holds, if that is of this cluster."""
        self._settings = settings
        self._keeper = Keeper(store) if store is not None else None
        self._state = self._first_state(self._keeper.load() if self._keeper else None)
        self._changed = asyncio.Event()
        self._reports: dict[str, dict[str, Any]] = {}
        self._scaling: dict[str, dict[str, Any]] = {}
        self._metrics = ControllerMetrics()
        self._cores = CoreLedger()
        self._leases = LeaseServer(
            self._lost, silence_s=settings.silence_s, certificate=ClusterCertificate.of(settings.cluster_tls)
        )
        self._lease_address: asyncio.Task[str] | None = None
        self._tasks: list[asyncio.Task[None]] = []

    async def join(
        self,
        role: str,
        id: str,
        pid: int,
        node: str,
        index: int | None = None,
        generation: int = 0,
        heard: int = 0,
    ) -> dict[str, Any]:
        """Take a member in, see Membership.join; returns its index, where and how often to beat, how long in vain."""
        self._start()
        if self._lease_address is None:
            self._lease_address = asyncio.create_task(self._leases.start(ray.util.get_node_ip_address()))
        lease_address = await self._lease_address
        self._apply(
            lambda state: state.join(
                id=id, role=Role(role), pid=pid, node=node, index=index, generation=generation, heard=heard
            )
        )
        logger.info("%s %s joined as number %d", role, id, self._state.members[id].index)
        token = secrets.token_hex(16)
        self._leases.expect(token, id)
        return {
            "lease_token": token,
            "index": self._state.members[id].index,
            "lease_address": lease_address,
            "beat_s": self._settings.beat_s,
            "silence_s": self._settings.silence_s,
        }

    async def take_cores(self, id: str, machine: Machine, wanted: Wanted) -> CoreShare:
        """Cores for a member's compute threads, beside those of the living members on its machine."""
        return self._cores.take(id, machine, wanted)

    async def keep_cores(self, id: str, share: CoreShare) -> None:
        """A member has these cores: it was given them now, or by this controller's predecessor."""
        if id in self._state.members:
            self._cores.keep(id, share)

    async def identify(self, id: str, identity: dict[str, Any]) -> None:
        """A member has loaded its part of this model, see Membership.identify."""
        self._apply(lambda state: state.identify(id, identity))

    async def ready(self, id: str, address: str) -> None:
        self._apply(lambda state: state.ready(id, address))

    async def prepared(self, id: str, generation: int) -> None:
        """An expert group holds what it needs in a proposed generation, see Membership.prepared."""
        self._apply(lambda state: state.prepared(id, generation))

    async def adopted(self, id: str, generation: int) -> None:
        """A shard uses a generation and none before it, see Membership.adopted."""
        self._apply(lambda state: state.adopted(id, generation))

    async def accuse(self, by: str, group_id: str, reason: str, charge: Charge) -> bool:
        """A shard finds a group bad, see Membership.accuse; whether it is given up now."""
        self._apply(lambda state: state.accuse(by, group_id, reason, charge))
        group = self._state.members.get(group_id)
        believed = group is None or group.given_up
        logger.warning("%s accuses %s: %s (%s)", by, group_id, reason, "given up" if believed else "kept")
        return believed

    async def drain(self, id: str) -> None:
        self._apply(lambda state: state.drain(id))

    async def scale(self, role: str, count: int) -> None:
        """So many processes of a role are wanted from now on; only the number of expert groups is of matter here.

        Raises:
            MembershipError: not a possible number.
        """
        if Role(role) is Role.EXPERT_GROUP:
            self._apply(lambda state: state.scale(count))

    async def note_scaling(self, reasons: dict[str, dict[str, Any]]) -> None:
        """What autoscaling wants of each pool, and why: pool -> count, reason and its cause."""
        self._scaling = reasons
        self._metrics.scaled(reasons)

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

    async def placement(self, generation: int) -> dict[str, Any] | None:
        """The expert map of a generation in force, proposed or still used, as JSON; None of others."""
        found = self._state.generation(generation)
        return found.placement.to_json() if found is not None and found.placement is not None else None

    async def retire(self) -> None:
        """The cluster is being taken down: nothing of it is to be remembered."""
        if self._keeper is not None:
            await self._keeper.close()

    async def samples(self) -> list[Sample]:
        """The cluster's own numbers, for whoever shows them (`moeray.controller.mirror`)."""
        return list(self._metrics.samples(self._state))

    async def state(self) -> dict[str, Any]:
        """What `moeray status --json` prints, plus the generation's completeness."""
        mismatches = self._state.mismatches()
        members = sorted(self._state.members.values(), key=lambda member: (member.role, member.index, member.id))
        return {
            "generation": self._state.current.number,
            "model": self._settings.model,
            "is_complete": self._state.is_complete,
            "is_covered": self._state.is_covered,
            **describe_generations(self._state),
            "endpoints": self._endpoints(),
            "mismatches": list(mismatches.values()),
            "warnings": self._cores.crowding,
            "autoscaling": self._scaling,
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

    def _first_state(self, snapshot: str | None) -> Membership:
        settings, epoch = self._settings, secrets.randbits(62) + 1
        if snapshot is not None:
            try:
                return from_json(snapshot, settings.layout, settings.delays, epoch=epoch, now=time.monotonic())
            except SnapshotError as error:
                logger.error("beginning anew: %s", error)
        return Membership.start(
            settings.num_groups, settings.layout, settings.delays, epoch=epoch, now=time.monotonic()
        )

    def _start(self) -> None:
        """What goes on in the background; begun by the first member, because the constructor has no event loop."""
        if self._tasks:
            return
        self._tasks.append(asyncio.create_task(self._tick()))
        if self._keeper is not None:
            self._tasks.append(asyncio.create_task(self._keeper.keep()))
        if self._settings.rebalance_s:
            rebalancing = rebalance(
                self._settings.rebalance_s,
                self._settings.layout,
                lambda: self._state,
                lambda: self._reports,
                self._propose,
            )
            self._tasks.append(asyncio.create_task(rebalancing))

    async def _tick(self) -> None:
        returned_by = time.monotonic() + self._settings.silence_s
        while True:
            await asyncio.sleep(TICK_S)
            if self._state.awaited and time.monotonic() > returned_by:
                for id in self._state.awaited:
                    self._lost(id, "did not come back to the restarted controller")
            self._apply(Membership.tick)

    def _propose(self, placement: Placement, based_on: int) -> None:
        self._apply(lambda state: state.propose_placement(placement, based_on))

    def _endpoints(self) -> dict[str, str]:
        for member in self._state.members.values():
            if member.role is Role.INGRESS and member.is_alive and "endpoints" in self._reports.get(member.id, {}):
                endpoints: dict[str, str] = self._reports[member.id]["endpoints"]
                return endpoints
        return {}

    def _lost(self, id: str, reason: str) -> None:
        if id in self._state.members:
            logger.warning("%s lost: %s", id, reason)
            if self._state.members[id].is_alive:
                self._metrics.lost(self._state.members[id].role)
        self._apply(lambda state: state.lose(id, reason))

    def _apply(self, event: Callable[[Membership], Membership]) -> None:
        before, self._state = self._state, event(self._state.at(time.monotonic()))
        if self._state.version == before.version:
            return
        self._metrics.applied(before, self._state)
        mismatches, known = self._state.mismatches(), before.mismatches()
        for id, difference in mismatches.items():
            if known.get(id) != difference:
                logger.error("no generation with %s: %s", id, difference)
        self._log_generations(before)
        self._reports = {id: report for id, report in self._reports.items() if id in self._state.members}
        self._cores.free_all_but(id for id, member in self._state.members.items() if member.is_alive)
        if self._keeper is not None:
            self._keeper.put(self._state)
        self._changed.set()
        self._changed = asyncio.Event()

    def _log_generations(self, before: Membership) -> None:
        state, proposal = self._state, self._state.proposal
        if state.current.number != before.current.number:
            logger.info("generation %d is in force: %s", state.current.number, ", ".join(state.current.groups))
        if proposal is not None and (before.proposal is None or before.proposal.number != proposal.number):
            logger.info("generation %d is proposed: %s", proposal.number, ", ".join(proposal.groups))
        if proposal is None and before.proposal is not None and before.proposal.number != state.current.number:
            logger.warning("generation %d is withdrawn", before.proposal.number)


class ControllerActor(Controller):
    """The actor: its state is kept under its id, which a restart does not change and another cluster never has.

    Ray starts another when it ends, which it does, too, when it hangs.
    """

    def __init__(self, settings: ControllerSettings) -> None:
        super().__init__(settings, open_store(settings.redis_url, ray.get_runtime_context().get_actor_id()))
        self._watched = guard(settings.hang_s)


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
    actor = ray.remote(num_cpus=0, max_restarts=-1, max_concurrency=1000)(ControllerActor)
    return actor.options(name=CONTROLLER_NAME, namespace=NAMESPACE, lifetime="detached", get_if_exists=True).remote(
        settings
    )
