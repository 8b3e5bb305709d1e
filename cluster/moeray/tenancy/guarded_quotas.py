"""What an ingress does when the quotas' store is dead or slow: refuse (closed), or count by itself for a while (open).

A call that takes longer than the timeout counts as failed. After a failure the store is left alone for RETRY_S; then
one call tries it while all others still do without. So a dead store costs one timeout per RETRY_S, and is used again by
itself. Requests that ended meanwhile are settled when it is back.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Awaitable, Callable
from dataclasses import fields, replace
from typing import Literal, TypeVar

from moeray.tenancy.errors import QuotaExceeded, QuotaStoreDown
from moeray.tenancy.local_quotas import LocalQuotas
from moeray.tenancy.quotas import QuotaStore, Reservation
from moeray.tenancy.tenant import Limits, Tenant

RETRY_S = 1.0
MAX_LATE = 10_000
"""Reservations that ended while the store was away and are still to be settled; the oldest are given up."""

OnFailure = Literal["closed", "open"]
_T = TypeVar("_T")
_logger = logging.getLogger(__name__)


class GuardedQuotas:
    """A QuotaStore around another one. For one event loop.

    Attributes:
        is_down: whether the store failed last.
        num_unsettled: reservations that could not be settled and were given up; they stay charged.
    """

    def __init__(
        self, store: QuotaStore, *, on_failure: OnFailure, timeout_s: float, num_ingresses: Callable[[], int],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:  # fmt: skip
        """`num_ingresses` share each limit while they cannot count together (open)."""
        self._store, self._on_failure, self._timeout_s = store, on_failure, timeout_s
        self._num_ingresses, self._clock = num_ingresses, clock
        self._local = LocalQuotas()
        self._by_itself: set[str] = set()
        self._late: deque[tuple[Reservation, int | None]] = deque()
        self._settling: asyncio.Task[None] | None = None
        self._retry_at, self._is_trying = 0.0, False
        self.is_down = False
        self.num_unsettled = 0

    async def reserve(self, tenant: Tenant, *, requests: int = 1, tokens: int = 0) -> Reservation:
        """See QuotaStore. A tenant without limits that are counted needs no store."""
        if tenant.limits.needs_counting:
            try:
                return await self._ask(lambda: self._store.reserve(tenant, requests=requests, tokens=tokens))
            except QuotaStoreDown:
                if self._on_failure == "closed":
                    raise
        reservation = await self._local.reserve(self._part_of(tenant), requests=requests, tokens=tokens)
        self._by_itself.add(reservation.id)
        return reservation

    async def settle(self, reservation: Reservation, tokens: int) -> None:
        """See QuotaStore; never raises."""
        if reservation.id in self._by_itself:
            self._by_itself.discard(reservation.id)
            await self._local.settle(reservation, tokens)
        else:
            await self._end(reservation, tokens)

    async def release(self, reservation: Reservation) -> None:
        """See QuotaStore; never raises."""
        if reservation.id in self._by_itself:
            self._by_itself.discard(reservation.id)
            await self._local.release(reservation)
        else:
            await self._end(reservation, None)

    async def _end(self, reservation: Reservation, tokens: int | None) -> None:
        try:
            await self._ask(lambda: self._close(reservation, tokens))
        except QuotaStoreDown:
            self._late.append((reservation, tokens))
            if len(self._late) > MAX_LATE:
                self._late.popleft()
                self.num_unsettled += 1

    def _close(self, reservation: Reservation, tokens: int | None) -> Awaitable[None]:
        if tokens is None:
            return self._store.release(reservation)
        return self._store.settle(reservation, tokens)

    async def _ask(self, call: Callable[[], Awaitable[_T]]) -> _T:
        """Raises QuotaStoreDown at once while the store is left alone."""
        was_down = self.is_down
        if was_down and (self._is_trying or self._clock() < self._retry_at):
            raise QuotaStoreDown("the store of the quotas does not answer")
        self._is_trying = was_down
        try:
            async with asyncio.timeout(self._timeout_s):
                result = await call()
        except (QuotaStoreDown, TimeoutError) as error:
            self._failed(error)
            raise QuotaStoreDown("the store of the quotas does not answer") from error
        except QuotaExceeded:
            self._succeeded()
            raise
        finally:
            if was_down:
                self._is_trying = False
        self._succeeded()
        return result

    def _failed(self, error: Exception) -> None:
        self._retry_at = self._clock() + RETRY_S
        if not self.is_down:
            policy = "requests are refused" if self._on_failure == "closed" else "limits are kept by each ingress alone"
            _logger.error("the store of the quotas does not answer; until it does, %s: %r", policy, error)
        self.is_down = True

    def _succeeded(self) -> None:
        if self.is_down:
            self.is_down = False
            _logger.warning("the store of the quotas answers again")
        if self._late and (self._settling is None or self._settling.done()):
            self._settling = asyncio.create_task(self._settle_late())  # no request waits for those of others

    async def _settle_late(self) -> None:
        while self._late and not self.is_down:
            reservation, tokens = self._late.popleft()
            try:
                async with asyncio.timeout(self._timeout_s):
                    await self._close(reservation, tokens)
            except (QuotaStoreDown, TimeoutError) as error:
                self._late.appendleft((reservation, tokens))
                self._failed(error)

    def _part_of(self, tenant: Tenant) -> Tenant:
        """With limits that all ingresses together keep; but each may have one of what there is a limit of."""
        share = max(1, self._num_ingresses())
        parts = {each.name: getattr(tenant.limits, each.name) for each in fields(Limits) if each.name != "max_context"}
        smaller = {name: max(1, value // share) for name, value in parts.items() if value}
        return replace(tenant, limits=replace(tenant.limits, **smaller))
