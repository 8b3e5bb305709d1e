"""Both stores against the simplest model: a list of all that was granted, with its time."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule, run_state_machine_as_test
from redis import Redis
from redis_server import RedisServer

from moeray.tenancy import Limits, LocalQuotas, QuotaExceeded, QuotaStore, RedisQuotas, Tenant, connect_async
from moeray.tenancy.quotas import Reservation

BUCKET_US, WINDOW_US = 100_000, 60_000_000
START = int(datetime(2026, 12, 31, 23, 57, tzinfo=UTC).timestamp()) * 1_000_000
NAMES = ("requests_per_minute", "tokens_per_minute", "concurrent_requests", "tokens_per_month")
TO_BUCKETS_END = -1


@dataclass
class Granted:
    """One reservation, as the model knows it."""

    reservation: Reservation
    at_us: int
    tokens: int
    requests: int = 1
    is_open: bool = True


@dataclass
class Model:
    limits: Limits
    granted: list[Granted] = field(default_factory=list)

    def refuses(self, name: str, now_us: int, tokens: int) -> bool:
        # A bucket counts until none of it is younger than the window.
        oldest = (now_us - WINDOW_US) // BUCKET_US
        recent = [each for each in self.granted if each.at_us // BUCKET_US >= oldest]
        month = [each for each in self.granted if month_text(each.at_us) == month_text(now_us)]
        taken = {
            "requests_per_minute": sum(each.requests for each in recent) + 1,
            "tokens_per_minute": sum(each.tokens for each in recent) + tokens,
            "concurrent_requests": sum(each.is_open for each in self.granted) + 1,
            "tokens_per_month": sum(each.tokens for each in month) + tokens,
        }
        return 0 < getattr(self.limits, name) < taken[name]


def month_text(now_us: int) -> str:
    return datetime.fromtimestamp(now_us / 1e6, UTC).strftime("%Y-%m")


class Quotas(RuleBasedStateMachine):
    make_store: Callable[[Callable[[], int]], QuotaStore]  # set by the test
    loop: asyncio.AbstractEventLoop

    # Few numbers, so that sums meet limits.
    @initialize(
        requests=st.integers(0, 4), tokens=st.sampled_from([0, 10, 25, 60]), concurrent=st.integers(0, 3),
        month=st.sampled_from([0, 26, 50, 75, 100]),
    )  # fmt: skip
    def begin(self, requests: int, tokens: int, concurrent: int, month: int) -> None:
        limits = Limits(requests, tokens, concurrent, month)
        self.now_us, self.tenant, self.model = START, Tenant(name="search", limits=limits), Model(limits)
        self.store = type(self).make_store(lambda: self.now_us)

    @rule(us=st.one_of(st.just(TO_BUCKETS_END), st.integers(0, 2 * BUCKET_US), st.integers(0, 70_000_000)))
    def wait(self, us: int) -> None:
        self.now_us += BUCKET_US - 1 - self.now_us % BUCKET_US if us == TO_BUCKETS_END else us

    @rule(tokens=st.sampled_from([0, 1, 5, 10, 25, 50, 70]))
    def reserve(self, tokens: int) -> None:
        refusing = [name for name in NAMES if self.model.refuses(name, self.now_us, tokens)]
        refused: QuotaExceeded | None = None
        try:
            reservation = self.loop.run_until_complete(self.store.reserve(self.tenant, tokens=tokens))
        except QuotaExceeded as error:
            refused = error
        assert (refused is not None) == bool(refusing)
        if refused is None:
            self.model.granted.append(Granted(reservation, self.now_us, tokens))
        else:
            assert refused.limit in refusing
            self.check_time(refused, tokens)

    def check_time(self, error: QuotaExceeded, tokens: int) -> None:
        """The limit that is named lets the request pass at the time that is named, and no microsecond before."""
        if error.retry_after_s is None:
            assert tokens > getattr(self.model.limits, error.limit)
        elif error.limit != "concurrent_requests":
            then_us = self.now_us + round(error.retry_after_s * 1e6)
            assert not self.model.refuses(error.limit, then_us, tokens)
            assert self.model.refuses(error.limit, then_us - 1, tokens)

    @precondition(lambda self: self.model.granted)
    @rule(choice=st.integers(0), tokens=st.sampled_from([None, 0, 1, 5, 25, 100]))
    def close(self, choice: int, tokens: int | None) -> None:
        """Settle, or (None) release; also what was closed before, which must do nothing."""
        each = self.model.granted[choice % len(self.model.granted)]
        ended = self.store.release(each.reservation) if tokens is None else self.store.settle(each.reservation, tokens)
        self.loop.run_until_complete(ended)
        if not each.is_open:
            return
        each.is_open = False
        # What has left the window stays out of it, but the month is corrected.
        each.tokens, each.requests = (0, 0) if tokens is None else (tokens, 1)


def run(make_store: Callable[[Callable[[], int]], QuotaStore], loop: asyncio.AbstractEventLoop, num: int) -> None:
    machine = type("Machine", (Quotas,), {"make_store": staticmethod(make_store), "loop": loop})
    options = settings(
        max_examples=num, stateful_step_count=40, deadline=None, suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    try:
        run_state_machine_as_test(machine, settings=options)
    finally:
        loop.close()


def test_in_process_it_decides_as_the_model_does() -> None:
    run(LocalQuotas, asyncio.new_event_loop(), 100)


def test_in_redis_it_decides_as_the_model_does(redis: Redis, redis_server: RedisServer) -> None:
    loop = asyncio.new_event_loop()
    client = connect_async(redis_server.url, None, timeout_s=60.0)

    def emptied(clock: Callable[[], int]) -> RedisQuotas:
        redis.flushall()
        return RedisQuotas(client, clock)

    # Leases of a process that lives are renewed; the model's time runs without that.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("moeray.tenancy.redis_quotas.LEASE_S", 1e6)
        run(emptied, loop, 40)
