"""Reserve, then settle: what a request may take is counted before it begins, what it took when it ends.

A reservation takes all of a tenant's limits or none. Its tokens are an upper bound (prompt and longest answer), so the
sum of what was granted never passes a limit; `settle` gives back what was not used. Tokens count at the time of the
reservation: in the 60 s after it, and in its month.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Protocol

from moeray.tenancy.tenant import Limits, Tenant

REQUESTS, TOKENS = "requests_per_minute", "tokens_per_minute"
CONCURRENT, MONTH = "concurrent_requests", "tokens_per_month"
BUSY_RETRY_S = 1.0
"""When to try again where another request must end first: nobody knows when it does."""


@dataclass(slots=True, eq=False)
class Reservation:
    """A place among a tenant's requests. Good for one `settle` or `release`; more of them do nothing.

    Attributes:
        bucket: of the window that it was counted in; store's own.
        month: that it was counted in, as 202611; store's own.
        remaining: what was left of each limit afterwards, by name.
        reset_s: when each would be whole again, by name.
        used: tokens so far, kept up to date by whoever streams; it is charged if this process dies.
    """

    id: str
    tenant: str
    requests: int
    tokens: int
    bucket: int
    month: int
    remaining: Mapping[str, int]
    reset_s: Mapping[str, float]
    used: int = 0


class QuotaStore(Protocol):
    """Counts. For one event loop."""

    async def reserve(self, tenant: Tenant, *, requests: int = 1, tokens: int = 0) -> Reservation:
        """Take a place.

        Args:
            tokens: the most that the request may take, prompt and answer.
        Raises:
            QuotaExceeded: nothing was taken.
            QuotaStoreDown: the store does not answer.
        """
        ...

    async def settle(self, reservation: Reservation, tokens: int) -> None:
        """The request has ended and took `tokens`, even if more than was reserved. Never QuotaExceeded."""
        ...

    async def release(self, reservation: Reservation) -> None:
        """The request has not begun: everything is given back, also its place in the window."""
        ...


def new_id() -> str:
    return secrets.token_hex(8)


def month_of(unix_s: float) -> int:
    """Calendar month in UTC, as 202611."""
    moment = datetime.fromtimestamp(unix_s, UTC)
    return moment.year * 100 + moment.month


def seconds_to_next_month(unix_s: float) -> float:
    moment = datetime.fromtimestamp(unix_s, UTC)
    year, month = (moment.year + 1, 1) if moment.month == 12 else (moment.year, moment.month + 1)
    return datetime(year, month, 1, tzinfo=UTC).timestamp() - unix_s


def quota_state(limits: Limits, num_open: int, requests: int, tokens: int, month_tokens: int) -> dict[str, int]:
    """What is left of each limit that there is."""
    pairs = (
        (REQUESTS, limits.requests_per_minute, requests),
        (TOKENS, limits.tokens_per_minute, tokens),
        (CONCURRENT, limits.concurrent_requests, num_open),
        (MONTH, limits.tokens_per_month, month_tokens),
    )
    return {name: max(0, limit - taken) for name, limit, taken in pairs if limit}


def reset_times(left: Mapping[str, int], window_us: int, now_us: int) -> dict[str, float]:
    """When each limit would be whole again, if nothing else came."""
    times = {REQUESTS: window_us / 1e6, TOKENS: window_us / 1e6, CONCURRENT: BUSY_RETRY_S}
    return {name: times[name] if name in times else seconds_to_next_month(now_us / 1e6) for name in left}
