"""Quotas in process: for one ingress, and for an ingress whose Redis is away."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

from moeray.tenancy.errors import QuotaExceeded
from moeray.tenancy.quotas import (
    BUSY_RETRY_S,
    CONCURRENT,
    MONTH,
    REQUESTS,
    TOKENS,
    Reservation,
    month_of,
    new_id,
    quota_state,
    reset_times,
    seconds_to_next_month,
)
from moeray.tenancy.sliding_window import SlidingWindow
from moeray.tenancy.tenant import Limits, Tenant


def _now_us() -> int:
    return time.time_ns() // 1000


class _Account:
    """One tenant's counts."""

    __slots__ = ("month", "month_tokens", "open", "window")

    def __init__(self) -> None:
        self.window = SlidingWindow()
        self.open: dict[str, Reservation] = {}
        self.month, self.month_tokens = 0, 0

    def turn(self, now_us: int) -> None:
        self.window.forget(now_us)
        if (month := month_of(now_us / 1e6)) != self.month:
            self.month, self.month_tokens = month, 0


class LocalQuotas:
    """A QuotaStore. Its calls never wait. Counts end with the process; months can be begun with what is known."""

    def __init__(self, clock_us: Callable[[], int] = _now_us, month_tokens: Mapping[str, int] | None = None) -> None:
        """Begin with nothing counted.

        Args:
            clock_us: microseconds since 1970.
            month_tokens: what tenants have used in this month already, from the usage records.
        """
        self._clock_us = clock_us
        self._accounts: dict[str, _Account] = {}
        month = month_of(clock_us() / 1e6)
        for name, tokens in (month_tokens or {}).items():
            account = self._accounts.setdefault(name, _Account())
            account.month, account.month_tokens = month, tokens

    async def reserve(self, tenant: Tenant, *, requests: int = 1, tokens: int = 0) -> Reservation:
        """See QuotaStore."""
        now_us, limits = self._clock_us(), tenant.limits
        account = self._accounts.setdefault(tenant.name, _Account())
        account.turn(now_us)
        self._check(account, limits, requests, tokens, now_us)
        bucket = account.window.add(now_us, requests, tokens)
        account.month_tokens += tokens
        reservation = Reservation(new_id(), tenant.name, requests, tokens, bucket, account.month, {}, {})
        account.open[reservation.id] = reservation
        reservation.remaining, reservation.reset_s = _state(account, limits, now_us)
        return reservation

    async def settle(self, reservation: Reservation, tokens: int) -> None:
        """See QuotaStore."""
        self._close(reservation, 0, tokens - reservation.tokens)

    async def release(self, reservation: Reservation) -> None:
        """See QuotaStore."""
        self._close(reservation, -reservation.requests, -reservation.tokens)

    def _close(self, reservation: Reservation, requests: int, tokens: int) -> None:
        account = self._accounts.get(reservation.tenant)
        if account is None or account.open.pop(reservation.id, None) is None:
            return
        account.turn(self._clock_us())
        account.window.change(reservation.bucket, requests, tokens)
        if reservation.month == account.month:
            account.month_tokens += tokens

    @staticmethod
    def _check(account: _Account, limits: Limits, requests: int, tokens: int, now_us: int) -> None:
        """Raises QuotaExceeded for the limit that takes longest to be free."""
        window = account.window
        waits: dict[str, float] = {}
        if (limit := limits.concurrent_requests) and (over := len(account.open) + 1 - limit) > 0:
            waits[CONCURRENT] = BUSY_RETRY_S
        if (limit := limits.requests_per_minute) and (over := window.requests + requests - limit) > 0:
            never = requests > limit
            waits[REQUESTS] = float("inf") if never else window.free_in_us(now_us, requests=over) / 1e6
        if (limit := limits.tokens_per_minute) and (over := window.tokens + tokens - limit) > 0:
            never = tokens > limit
            waits[TOKENS] = float("inf") if never else window.free_in_us(now_us, tokens=over) / 1e6
        if (limit := limits.tokens_per_month) and account.month_tokens + tokens > limit:
            waits[MONTH] = float("inf") if tokens > limit else seconds_to_next_month(now_us / 1e6)
        if waits:
            name = max(waits, key=waits.__getitem__)
            retry_s = None if waits[name] == float("inf") else waits[name]
            raise QuotaExceeded(name, retry_s, *_state(account, limits, now_us))


def _state(account: _Account, limits: Limits, now_us: int) -> tuple[dict[str, int], dict[str, float]]:
    window = account.window
    left = quota_state(limits, len(account.open), window.requests, window.tokens, account.month_tokens)
    return left, reset_times(left, window.reset_us(now_us), now_us)
