"""Quotas in Redis: exact over all ingresses. One script per call, by the server's clock, all limits or none.

All keys of a tenant are in one slot, so it works on Redis Cluster too. A reservation is a lease: `keep_alive` renews
those of this process, with what they have used so far; those of a process that died lose their place after LEASE_S, and
are charged what was last known.
"""

from __future__ import annotations

import asyncio
import logging
from collections import defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from redis import RedisError
from redis.asyncio import Redis

from moeray.tenancy.errors import QuotaExceeded, QuotaStoreDown
from moeray.tenancy.quotas import (
    CONCURRENT,
    MONTH,
    REQUESTS,
    TOKENS,
    Reservation,
    new_id,
    quota_state,
    reset_times,
    seconds_to_next_month,
)
from moeray.tenancy.tenant import Limits, Tenant

LEASE_S = 30.0
BEAT_S = 10.0
MAX_RENEWALS = 500
"""Leases renewed by one call: Redis does nothing else meanwhile."""

_PLACES = (CONCURRENT, REQUESTS, TOKENS, MONTH)
_LUA = Path(__file__).parent / "lua"
_NEVER, _NEXT_MONTH = -1, -2
_logger = logging.getLogger(__name__)


def quota_keys(tenant: str) -> list[str]:
    """state, buckets, leases: see lua/window.lua."""
    return [f"moeray:quota:{{{tenant}}}:{part}" for part in ("state", "buckets", "leases")]


class RedisQuotas:
    """A QuotaStore. For one event loop."""

    def __init__(self, client: Redis, clock_us: Callable[[], int] | None = None) -> None:
        """`client` decodes its answers (see `redis_connection`); `clock_us` is instead of the server's clock."""
        shared = (_LUA / "window.lua").read_text()
        self._reserve, self._close, self._renew = (
            client.register_script(shared + (_LUA / f"{name}.lua").read_text())
            for name in ("reserve", "close", "renew")
        )
        self._clock_us = clock_us
        self._open: dict[str, Reservation] = {}

    async def reserve(self, tenant: Tenant, *, requests: int = 1, tokens: int = 0) -> Reservation:
        """See QuotaStore."""
        limits, id = tenant.limits, new_id()
        bounds = [getattr(limits, name) for name in _PLACES]
        answer = await self._call(self._reserve, tenant.name, [id, requests, tokens, int(LEASE_S * 1e6), *bounds])
        refused, retry_us, bucket, month, now_us = answer[:5]
        remaining, reset_s = _state(limits, answer[5:], now_us)
        if refused:
            raise QuotaExceeded(_PLACES[refused - 1], _retry_s(retry_us, now_us), remaining, reset_s)
        reservation = Reservation(id, tenant.name, requests, tokens, bucket, month, remaining, reset_s)
        self._open[id] = reservation
        return reservation

    async def settle(self, reservation: Reservation, tokens: int) -> None:
        """See QuotaStore. May be tried again after QuotaStoreDown: only the first that arrives counts."""
        await self._end(reservation, 1, tokens)

    async def release(self, reservation: Reservation) -> None:
        """See QuotaStore; as `settle`."""
        await self._end(reservation, 0, 0)

    async def renew(self) -> None:
        """Renew every lease of this process.

        Raises:
            QuotaStoreDown: Redis does not answer; those that were not reached have LEASE_S in all.
        """
        by_tenant: dict[str, list[Reservation]] = defaultdict(list)
        for reservation in self._open.values():
            by_tenant[reservation.tenant].append(reservation)
        for tenant, reservations in by_tenant.items():
            for first in range(0, len(reservations), MAX_RENEWALS):
                pairs = [(each.id, each.used) for each in reservations[first : first + MAX_RENEWALS]]
                await self._call(self._renew, tenant, [int(LEASE_S * 1e6), *(part for pair in pairs for part in pair)])

    async def keep_alive(self) -> None:
        """Run as a task until cancelled."""
        while True:
            await asyncio.sleep(BEAT_S)
            try:
                await self.renew()
            except QuotaStoreDown as error:
                _logger.warning("leases of requests were not renewed: %s", error)

    async def _end(self, reservation: Reservation, keeps_request: int, tokens: int) -> None:
        self._open.pop(reservation.id, None)
        await self._call(self._close, reservation.tenant, [reservation.id, keeps_request, tokens])

    async def _call(self, script: Any, tenant: str, arguments: Iterable[Any]) -> Any:
        now = "" if self._clock_us is None else self._clock_us()
        try:
            return await script(keys=quota_keys(tenant), args=[now, *arguments])
        except (RedisError, OSError, TimeoutError) as error:
            raise QuotaStoreDown(f"redis: {type(error).__name__}: {error}") from error


def _retry_s(retry_us: int, now_us: int) -> float | None:
    if retry_us == _NEVER:
        return None
    return seconds_to_next_month(now_us / 1e6) if retry_us == _NEXT_MONTH else retry_us / 1e6


def _state(limits: Limits, counts: list[int], now_us: int) -> tuple[dict[str, int], dict[str, float]]:
    left = quota_state(limits, *counts[:4])
    return left, reset_times(left, counts[4], now_us)
