"""What one ingress knows and counts of its tenants. `run` keeps it up to date."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Callable, Coroutine, Iterable, Sequence
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import TYPE_CHECKING, Any

from moeray.ingress.arrivals import came_from
from moeray.ingress.tenants.call import Call
from moeray.ingress.tenants.refusals import refused
from moeray.telemetry import RequestMetrics
from moeray.tenancy import (
    Authenticator,
    FairClock,
    Principal,
    QuotaStore,
    Registry,
    TokenVerifier,
    Unauthenticated,
    UsageRecord,
    UsageWriter,
    cache_salt,
    credential_of,
    engine_priority,
    split_priority,
)
from moeray.vllm_hooks.admission import Need, Refused

if TYPE_CHECKING:
    from moeray.ingress.tenants.call import TenantPlace
    from moeray.tenancy import Tenant

LOWEST = 1000
"""How many classes below its own a tenant's request may ask to be put (`priority`, at most); never above."""


@dataclass(slots=True, eq=False)
class Tenants:
    """See module docstring. Single event loop.

    Attributes:
        model: the served model name.
        secret: of the cluster, for cache salts.
        metrics: told what calls took, and which were refused.
        watches: what `run` runs beside the registry's.
    """

    model: str
    registry: Registry
    quotas: QuotaStore
    usage: UsageWriter
    secret: bytes
    loop: asyncio.AbstractEventLoop
    tokens: TokenVerifier | None = None
    metrics: RequestMetrics = field(default_factory=RequestMetrics)
    watches: Sequence[Callable[[], Coroutine[Any, Any, None]]] = ()
    _clocks: defaultdict[int, FairClock] = field(default_factory=lambda: defaultdict(FairClock))
    _settling: set[asyncio.Task[None]] = field(default_factory=set)

    async def run(self) -> None:
        """Read tenants and keys again when they change, keep reservations alive; until cancelled."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self.registry.watch())
            if self.tokens is not None:
                tasks.create_task(self.tokens.watch())
            for watch in self.watches:
                tasks.create_task(watch())

    async def close(self) -> None:
        """Settle what has ended, write what was used."""
        if self._settling:
            await asyncio.wait(self._settling, timeout=1.0)
        await asyncio.to_thread(self.usage.close)

    # ---- who

    def call(self, headers: Iterable[tuple[str, str]], peer_names: Iterable[str], protocol: str) -> Call:
        """The call that came with these headers (metadata), from the owner of this certificate.

        Raises:
            Refused: 401.
        """
        try:
            principal = Authenticator(self.registry, self.tokens).authenticate(credential_of(headers), peer_names)
        except Unauthenticated as error:
            raise refused(error) from error
        came_from(principal.tenant.name)
        return Call(self, principal, protocol)

    def call_of(self, tenant: str, protocol: str) -> Call:
        """A call that this tenant has ordered before.

        Raises:
            Refused: 401, it is no tenant any more.
        """
        known = self.registry.roster.tenants.get(tenant)
        if known is None:
            raise Refused(f"there is no tenant {tenant} any more", HTTPStatus.UNAUTHORIZED)
        return Call(self, Principal(known, "", "key"), protocol)

    # ---- what it may take

    def priority(self, tenant: Tenant, need: Need) -> int:
        """vLLM's priority of a request: in its class, behind what its tenant has asked for before."""
        group = _class_of(tenant, need.priority)
        tag = self._clocks[group].tag(tenant.name, need.num_charged, tenant.weight)
        return engine_priority(group, tag)

    def give_back_share(self, tenant: Tenant, need: Need) -> None:
        """A request that `priority` was asked for was not taken."""
        self._settle_share(tenant, need, 0)

    def settle_share(self, place: TenantPlace) -> None:
        self._settle_share(place.call.tenant, place.need, place.num_used if place.has_begun else 0)

    def begun(self, priorities: Iterable[int]) -> None:
        """Requests of any ingress with these priorities are being served."""
        for priority in priorities:
            group, tag = split_priority(priority)
            self._clocks[group].started(tag)

    def salt(self, tenant: Tenant, wanted: str | None) -> str | None:
        return cache_salt(tenant, self.secret, wanted)

    # ---- what it took

    def end(self, call: Call, record: UsageRecord, *, is_free: bool) -> None:
        """A call is over. From any thread: an abandoned stream may be found by the collector."""
        self.usage.record(record)
        taken = {"prompt": record.prompt_tokens, "cached": record.cached_tokens, "answer": record.completion_tokens}
        self.metrics.charged(record.tenant, taken)
        for each in call.reservations:
            end = self.quotas.release(each) if is_free else self.quotas.settle(each, each.used)
            self.loop.call_soon_threadsafe(self._settle, end)

    def _settle(self, end: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(end)
        self._settling.add(task)
        task.add_done_callback(self._settling.discard)

    def _settle_share(self, tenant: Tenant, need: Need, used: int) -> None:
        group, _ = split_priority(need.priority)
        self._clocks[group].settle(tenant.name, need.num_charged, used, tenant.weight)


def _class_of(tenant: Tenant, wanted: int) -> int:
    return tenant.priority + min(max(wanted, 0), LOWEST)
