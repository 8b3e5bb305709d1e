"""One suite over both stores of quotas: limits are never passed, nothing is taken by a refusal, a place comes back."""

from __future__ import annotations

from collections.abc import AsyncIterator
from datetime import UTC, datetime

import pytest
from redis_server import RedisServer

from moeray.tenancy import (
    Limits,
    LocalQuotas,
    QuotaExceeded,
    QuotaStore,
    RedisQuotas,
    Reservation,
    Tenant,
    connect_async,
)

MINUTE_US = 60_000_000
BUCKET_US = 100_000
NOVEMBER = int(datetime(2026, 11, 30, 23, 58, tzinfo=UTC).timestamp()) * 1_000_000


class Clock:
    def __init__(self, now_us: int = NOVEMBER) -> None:
        self.now_us = now_us

    def __call__(self) -> int:
        return self.now_us

    def pass_s(self, seconds: float) -> None:
        self.now_us += round(seconds * 1e6)


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture(params=["local", "redis"])
async def store(request: pytest.FixtureRequest, clock: Clock) -> AsyncIterator[QuotaStore]:
    if request.param == "local":
        yield LocalQuotas(clock)
        return
    request.getfixturevalue("redis")
    server: RedisServer = request.getfixturevalue("redis_server")
    client = connect_async(server.url, None, timeout_s=60.0)
    yield RedisQuotas(client, clock)
    await client.aclose()


def tenant(**limits: int) -> Tenant:
    return Tenant(name="search", limits=Limits(**limits))


async def refused(store: QuotaStore, of: Tenant, tokens: int = 0, requests: int = 1) -> QuotaExceeded:
    with pytest.raises(QuotaExceeded) as caught:
        await store.reserve(of, requests=requests, tokens=tokens)
    return caught.value


async def test_no_minute_has_more_requests_than_the_limit(store: QuotaStore, clock: Clock) -> None:
    """Asked every 0.37 s for three minutes: every window of 60 s, wherever it begins."""
    of, granted = tenant(requests_per_minute=10), []
    for _ in range(3 * 162):
        try:
            await store.settle(await store.reserve(of), 0)
            granted.append(clock.now_us)
        except QuotaExceeded:
            pass
        clock.pass_s(0.37)
    assert len(granted) >= 30
    for start in granted:
        assert sum(start <= each < start + MINUTE_US for each in granted) <= 10
        assert sum(start - MINUTE_US < each <= start for each in granted) <= 10


async def test_a_refusal_says_when_it_would_pass_and_it_does_then_and_not_before(
    store: QuotaStore, clock: Clock
) -> None:
    of = tenant(requests_per_minute=3)
    for _ in range(3):
        await store.reserve(of)
        clock.pass_s(7.03)
    error = await refused(store, of)
    assert error.limit == "requests_per_minute"
    assert error.remaining == {"requests_per_minute": 0}
    assert error.retry_after_s is not None
    assert 0 < error.retry_after_s <= 60.0 - 3 * 7.03 + 0.1
    clock.pass_s(error.retry_after_s - 1e-6)
    await refused(store, of)
    clock.pass_s(1e-6)
    await store.reserve(of)
    await refused(store, of)


async def test_what_was_not_used_is_given_back_at_once(store: QuotaStore, clock: Clock) -> None:
    of = tenant(tokens_per_minute=100, tokens_per_month=150)
    first = await store.reserve(of, tokens=100)
    assert first.remaining == {"tokens_per_minute": 0, "tokens_per_month": 50}
    assert (await refused(store, of, tokens=1)).limit == "tokens_per_minute"
    await store.settle(first, 30)
    assert (await store.reserve(of, tokens=70)).remaining == {"tokens_per_minute": 0, "tokens_per_month": 50}


async def test_a_release_gives_everything_back(store: QuotaStore) -> None:
    of = tenant(requests_per_minute=1, tokens_per_minute=10, concurrent_requests=1, tokens_per_month=10)
    for _ in range(5):
        await store.release(await store.reserve(of, tokens=10))
    await store.reserve(of, tokens=10)
    await refused(store, of)


async def test_a_reservation_is_closed_once(store: QuotaStore) -> None:
    of = tenant(requests_per_minute=10, tokens_per_minute=100, concurrent_requests=2, tokens_per_month=100)
    first, _ = await store.reserve(of, tokens=50), await store.reserve(of, tokens=50)
    await store.settle(first, 10)
    for _ in range(3):
        await store.settle(first, 0)
        await store.release(first)
    third = await store.reserve(of, tokens=40)
    assert third.remaining == {
        "requests_per_minute": 7, "tokens_per_minute": 0, "concurrent_requests": 0, "tokens_per_month": 0,
    }  # fmt: skip


async def test_more_than_was_reserved_is_charged(store: QuotaStore, clock: Clock) -> None:
    of = tenant(tokens_per_minute=100, tokens_per_month=1000)
    await store.settle(await store.reserve(of, tokens=10), 110)
    assert (await refused(store, of, tokens=0)).remaining == {"tokens_per_minute": 0, "tokens_per_month": 890}
    clock.pass_s(60.1)
    assert (await store.reserve(of, tokens=100)).remaining["tokens_per_month"] == 790


async def test_a_refusal_takes_nothing_of_any_limit(store: QuotaStore) -> None:
    of = tenant(requests_per_minute=2, tokens_per_minute=1000, concurrent_requests=2, tokens_per_month=50)
    for _ in range(10):
        assert (await refused(store, of, tokens=51)).limit == "tokens_per_month"
    assert (await store.reserve(of, tokens=50)).remaining == {
        "requests_per_minute": 1, "tokens_per_minute": 950, "concurrent_requests": 1, "tokens_per_month": 0,
    }  # fmt: skip


async def test_more_than_the_limit_itself_is_never_and_the_longest_wait_is_told(store: QuotaStore) -> None:
    of = tenant(requests_per_minute=1, tokens_per_minute=100, concurrent_requests=1, tokens_per_month=100)
    error = await refused(store, of, tokens=101)
    assert (error.limit, error.retry_after_s) == ("tokens_per_minute", None)
    await store.reserve(of, tokens=100)
    error = await refused(store, of, tokens=1)
    assert (error.limit, error.retry_after_s) == ("tokens_per_month", 120.0)


async def test_places_are_free_when_requests_end_and_not_with_time(store: QuotaStore, clock: Clock) -> None:
    of = tenant(concurrent_requests=2)
    first, _ = await store.reserve(of), await store.reserve(of)
    clock.pass_s(20)
    error = await refused(store, of)
    assert (error.limit, error.retry_after_s) == ("concurrent_requests", 1.0)
    await store.settle(first, 0)
    await store.reserve(of)
    await refused(store, of)


async def test_a_month_begins_anew_and_is_charged_for_what_began_in_it(store: QuotaStore, clock: Clock) -> None:
    of = tenant(tokens_per_month=100)
    november = await store.reserve(of, tokens=90)
    clock.pass_s(121)  # December
    december = await store.reserve(of, tokens=100)
    assert (november.month, december.month) == (202611, 202612)
    await store.settle(november, 0)
    error = await refused(store, of, tokens=1)
    assert error.retry_after_s == 31 * 86400 - 1
    await store.settle(december, 99)
    assert (await store.reserve(of, tokens=1)).remaining == {"tokens_per_month": 0}


@pytest.mark.parametrize(
    "day", ["2024-02-29", "2026-01-01", "2026-12-31", "2027-03-01", "2096-02-29", "2100-02-28", "2100-03-01"]
)
async def test_months_are_those_of_the_calendar(store: QuotaStore, clock: Clock, day: str) -> None:
    clock.now_us = int(datetime.fromisoformat(f"{day}T23:59:59+00:00").timestamp()) * 1_000_000
    assert (await store.reserve(tenant(tokens_per_month=1))).month == int(day[:4]) * 100 + int(day[5:7])


async def test_tenants_do_not_touch_each_other(store: QuotaStore) -> None:
    limits = Limits(requests_per_minute=1, concurrent_requests=1)
    await store.reserve(Tenant(name="search", limits=limits))
    await store.reserve(Tenant(name="chat", limits=limits))
    await refused(store, Tenant(name="search", limits=limits))


async def test_new_limits_hold_for_what_was_counted_before(store: QuotaStore) -> None:
    for _ in range(5):
        await store.reserve(tenant(requests_per_minute=100))
    await refused(store, tenant(requests_per_minute=5))
    await store.reserve(tenant(requests_per_minute=6))


async def test_a_clock_that_is_set_back_neither_frees_nor_blocks_for_more_than_a_minute(
    store: QuotaStore, clock: Clock
) -> None:
    of = tenant(requests_per_minute=4)
    for _ in range(4):
        await store.reserve(of)
        clock.pass_s(1)
    clock.pass_s(-3600)
    await refused(store, of)
    clock.pass_s(59.9)
    await refused(store, of)
    clock.pass_s(0.2)
    await store.reserve(of)


async def test_exact_to_the_bucket_for_every_age(store: QuotaStore, clock: Clock) -> None:
    """Never free before 60 s, always 0.1 s after them, wherever in its bucket the request came."""
    of = tenant(requests_per_minute=1)
    for offset in (0, 1, BUCKET_US // 2, BUCKET_US - 1):
        clock.now_us = (clock.now_us // BUCKET_US + 1000) * BUCKET_US + offset
        reservation: Reservation = await store.reserve(of)
        assert 60.0 < reservation.reset_s["requests_per_minute"] <= 60.1
        clock.now_us += MINUTE_US - 1
        await refused(store, of)
        clock.now_us += 1 + BUCKET_US
        await store.release(await store.reserve(of))


async def test_numbers_of_any_size_are_counted_exactly(store: QuotaStore) -> None:
    big = 2**52
    of = tenant(tokens_per_month=big)
    await store.settle(await store.reserve(of, tokens=big), big - 1)
    assert (await store.reserve(of, tokens=1)).remaining == {"tokens_per_month": 0}
    await refused(store, of, tokens=1)
