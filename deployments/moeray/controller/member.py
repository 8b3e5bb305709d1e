"""What every Serve replica does to be part of the cluster: join, hold a lease, watch, report."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import time
from collections.abc import Awaitable, Callable
from typing import Any

import ray
from prometheus_client import CollectorRegistry
from ray import serve

from moeray.controller.actor import controller
from moeray.controller.lease import Lease
from moeray.controller.mirror import ControllerMirror
from moeray.controller.settings import ControllerSettings
from moeray.membership import Charge, MembershipError, Role, View
from moeray.mutual_tls import CertificateError, ClusterCertificate
from moeray.placement import CoreShare, Wanted
from moeray.placement.machine import pin_process, this_machine
from moeray.telemetry import Exporter, ProcessCollector, SampleCollector, samples_of, start_exporter

logger = logging.getLogger(__name__)

WATCH_S = 30.0
RETRY_S = 0.5
JOIN_ATTEMPTS = 30
LEAVE_S = 2.0


class ClusterMember:
    """One replica's membership. Survives a restart of the controller by joining again under its old number."""

    def __init__(self, role: Role, settings: ControllerSettings) -> None:
        self._role = role
        self._certificate = ClusterCertificate.of(settings.cluster_tls)
        self._controller = controller(settings)
        self._lease: Lease | None = None
        self._alone_since: float | None = None
        self._tasks: list[asyncio.Task[None]] = []
        self._address = ""
        self._identity: dict[str, Any] | None = None
        self._report: dict[str, Any] = {}
        self._telemetry = settings.telemetry
        self._exporter: Exporter | None = None
        self._cores: CoreShare | None = None
        self._prepared = 0
        self._heard = 0
        self._is_draining = False
        self._going: asyncio.Task[None] | None = None
        self.generation = 0  # the newest one it is part of (an expert group) or has adopted (a shard)
        self.id = serve.get_replica_context().replica_id.unique_id
        self.index: int | None = None
        self.registry = CollectorRegistry()  # of this process' metrics; read in another thread
        self.registry.register(ProcessCollector())

    @property
    def alone_s(self) -> float:
        """How long it has had no lease since it lost it; 0 while it has one."""
        return 0.0 if self._alone_since is None else time.monotonic() - self._alone_since

    async def join(self) -> int:
        """Become a member; returns the index within the role.

        Raises:
            MembershipError: refused after some seconds of trying (a replica can be back before its predecessor's
                death was noticed, so one refusal means nothing).
        """
        index = await self._join()
        self._tasks.append(asyncio.create_task(self._keep_joined()))
        if self._role is Role.INGRESS:
            mirror = ControllerMirror(self._controller)
            self._tasks.append(asyncio.create_task(mirror.run()))
            self.registry.register(SampleCollector(mirror.samples))
        self.registry.register(SampleCollector(lambda: samples_of(self._role, index, self._report)))
        self._exporter = start_exporter(self._telemetry, self.registry)
        return index

    async def take_cores(self, num_threads: int, cluster_threads: int, *, has_relay: bool = False) -> CoreShare:
        """Get cores from the controller and keep every thread of this process on them; after `join`, once.

        Args:
            num_threads, cluster_threads, has_relay: see `Wanted`.
        """
        wanted = Wanted(
            name=f"{self._role.replace('_', ' ')} {self.index}", kind=self._role,
            node=ray.get_runtime_context().get_node_id(), num_threads=num_threads, has_relay=has_relay,
            cluster_threads=cluster_threads,
        )  # fmt: skip
        share: CoreShare = await self._controller.take_cores.remote(self.id, this_machine(), wanted)
        pin_process([*share.cores, share.relay.number])
        self._cores = share
        return share

    def cores(self) -> dict[str, Any]:
        """What `moeray status` shows of them."""
        share = self._cores
        if share is None:
            return {}
        relay = {"relay_core": share.relay.number} if share.kind == Role.ATTENTION_SHARD else {}
        return {"cores": share.cores, "numa_node": share.numa_node, "threads": share.num_threads, **relay}

    async def identify(self, identity: dict[str, Any]) -> None:
        """Tell which model this process has loaded; before `ready`, and for a shard before a generation can form.

        Args:
            identity: `ModelIdentity` as a mapping; empty where nothing must agree.
        """
        self._identity = identity
        await self._controller.identify.remote(self.id, identity)

    async def ready(self, address: str) -> None:
        self._address = address
        await self._controller.ready.remote(self.id, address)

    async def unready(self) -> None:
        self._address = ""
        await self._controller.unready.remote(self.id)

    async def lost(self, reason: str) -> None:
        """Tell why this process is of no more use, before Serve replaces it."""
        self._address = ""
        await self._controller.lose.remote(self.id, reason)

    async def report(self, report: dict[str, Any]) -> None:
        """Publish facts about this process; shown by `moeray status` as they are."""
        self._report = report
        shown = {} if self._exporter is None else {"metrics": self._exporter.address}
        await self._controller.report.remote(self.id, {**report, **shown})

    async def placement(self, generation: int) -> dict[str, Any] | None:
        """`Placement.to_json()` of a generation that is in force, proposed or still used; None if it is none of these.

        Without remote experts there is none.
        """
        result: dict[str, Any] | None = await self._controller.placement.remote(generation)
        return result

    async def prepared(self, generation: int) -> None:
        """An expert group has loaded what it needs in `generation`; may be said again."""
        self._prepared = generation
        await self._say(self._controller.prepared, generation)

    async def adopted(self, generation: int) -> None:
        """An attention shard uses `generation` and none before it; may be said again."""
        self.generation = max(self.generation, generation)
        await self._say(self._controller.adopted, generation)

    async def accuse(self, group_id: str, reason: str, charge: Charge) -> None:
        """Tell what is wrong with an expert group; if that is believed, it is in `View.lost` soon.

        Say it again when it happens again: coverage changes, and others may find the same.
        """
        await self._say(self._controller.accuse, group_id, reason, charge)

    async def drain(self) -> None:
        """Take nothing new, and let the others manage without this process; for good."""
        self._is_draining = True
        await self._say(self._controller.drain)

    def follow(self, on_view: Callable[[View], Awaitable[None]], on_told_to_go: Callable[[], Awaitable[None]]) -> None:
        """Call `on_view` with every new view until `leave`; an error in it is logged and a newer view awaited.

        Args:
            on_told_to_go: called once, beside the views, when this process is to go (`moeray restart`).
        """
        self._tasks.append(asyncio.create_task(self._follow(on_view, on_told_to_go)))

    def every(self, period_s: float, publish: Callable[[], Awaitable[dict[str, Any]]]) -> None:
        """Report what `publish` gives every `period_s`, if it changed."""
        self._tasks.append(asyncio.create_task(self._report_changes(period_s, publish)))

    async def _say(self, method: Any, *arguments: Any) -> Any:
        """Tell the controller. One that is away is told when this process joins again; one that refuses is believed."""
        try:
            return await method.remote(self.id, *arguments)
        except (ray.exceptions.RayError, MembershipError) as error:
            logger.warning("%s %s: the controller was not told: %s", self._role, self.id, error)
            return None

    async def leave(self) -> None:
        """Go in an orderly way: nobody is told that a process was lost."""
        for task in self._tasks:
            task.cancel()
        with contextlib.suppress(ray.exceptions.RayError, MembershipError, TimeoutError):
            await asyncio.wait_for(_awaited(self._controller.leave.remote(self.id)), LEAVE_S)
        if self._lease is not None:
            self._lease.close()
        if self._exporter is not None:
            await asyncio.to_thread(self._exporter.stop)

    async def _join(self) -> int:
        node = ray.get_runtime_context().get_node_id()
        for attempt in range(JOIN_ATTEMPTS):
            try:
                given = await self._controller.join.remote(
                    self._role, self.id, os.getpid(), node, self.index, self.generation, self._heard
                )
                break
            except MembershipError as error:
                if attempt == JOIN_ATTEMPTS - 1:
                    raise
                logger.warning("%s %s: %s; trying again", self._role, self.id, error)
                await asyncio.sleep(RETRY_S)
        lease = Lease(
            given["lease_address"], given["lease_token"], beat_s=given["beat_s"], silence_s=given["silence_s"],
            certificate=self._certificate,
        )  # fmt: skip
        await lease.start()
        self._lease, self._alone_since = lease, None  # now: one that never started is never lost
        self.index = int(given["index"])
        return self.index

    async def _keep_joined(self) -> None:
        while self._lease is not None:
            await self._lease.lost.wait()
            self._alone_since = self._alone_since or time.monotonic()
            logger.warning("%s %s: the controller is gone, joining again", self._role, self.id)
            try:
                await self._join()
            except (ray.exceptions.RayError, OSError, MembershipError, CertificateError) as error:
                logger.warning("%s %s: joining again failed: %s", self._role, self.id, error)
                await asyncio.sleep(RETRY_S)
                continue
            await self._until_told(self._lease)

    async def _until_told(self, lease: Lease) -> None:
        """Say everything again, however often that takes; if the lease is lost meanwhile, the next one begins anew."""
        while not lease.lost.is_set():
            try:
                await self._say_again()
                return
            except (ray.exceptions.RayError, MembershipError) as error:
                logger.warning("%s %s: the controller was not told everything again: %s", self._role, self.id, error)
                await asyncio.sleep(RETRY_S)

    async def _say_again(self) -> None:
        """What a controller that was away, or lost its memory, may not know."""
        if self._report:
            await self.report(self._report)
        if self._cores is not None:
            await self._controller.keep_cores.remote(self.id, self._cores)
        if self._identity is not None:
            await self.identify(self._identity)
        if self._address:
            await self.ready(self._address)
        if self._role is Role.ATTENTION_SHARD and self.generation:
            await self._unless_refused(self._controller.adopted, self.generation)
        if self._prepared:
            await self._unless_refused(self._controller.prepared, self._prepared)
        if self._is_draining:
            await self._unless_refused(self._controller.drain)

    async def _unless_refused(self, method: Any, *arguments: Any) -> None:
        """Like `_say`, but raises RayError where the controller does not answer."""
        try:
            await method.remote(self.id, *arguments)
        except MembershipError as error:
            logger.warning("%s %s: the controller refused: %s", self._role, self.id, error)

    async def _follow(
        self, on_view: Callable[[View], Awaitable[None]], on_told_to_go: Callable[[], Awaitable[None]]
    ) -> None:
        seen = (0, -1)  # which life of the controller, and its version
        generation, is_group = 0, self._role is Role.EXPERT_GROUP
        while True:
            try:
                view: View = await self._controller.watch.remote(*seen, WATCH_S)
                self._heard = max(self._heard, view.generation, view.proposed)
                # A controller that lost its memory knows nobody until the members have come back: what was in force
                # still is. Groups hear it nevertheless: it will propose, and they give up nothing without a newer one.
                if (view.epoch, view.version) != seen and (is_group or view.generation >= generation):
                    if self.id in view.groups:
                        self.generation = max(self.generation, view.generation if is_group else 0)
                    if self.id in view.draining and not self._is_draining:
                        self._is_draining = True
                        self._going = asyncio.create_task(_awaited(on_told_to_go()))
                    await on_view(view)
                    generation = max(generation, view.generation)
                seen = (view.epoch, view.version)
            except Exception:  # whatever it was (the controller restarts, a peer is away), a later view may be better
                logger.exception("%s %s: could not act on the cluster's new state", self._role, self.id)
                await asyncio.sleep(RETRY_S)

    async def _report_changes(self, period_s: float, publish: Callable[[], Awaitable[dict[str, Any]]]) -> None:
        while True:
            try:
                current = await publish()
                if current != self._report:
                    await self.report(current)
            except Exception as error:  # noqa: BLE001 a report is for people; the next one may get through
                logger.warning("%s %s: report: %s", self._role, self.id, error)
            await asyncio.sleep(period_s)


async def _awaited(ref: Any) -> Any:
    return await ref
