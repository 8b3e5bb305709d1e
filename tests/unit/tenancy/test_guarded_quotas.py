"""A dead or slow store costs one timeout at a time, refuses or not as it was said, and is used again by itself."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from redis_server import RedisServer

from moeray.tenancy import (
    GuardedQuotas,
    Limits,
    LocalQuotas,
    QuotaExceeded,
    QuotaStoreDown,
    RedisQuotas,
    Reservation,
    Tenant,
    connect_async,
)
from moeray.tenancy.guarded_quotas import MAX_LATE, RETRY_S, OnFailure
from moeray.tenancy.redis_quotas import quota_keys

SEARCH = Tenant(name="search", limits=Limits(requests_per_minute=9, tokens_per_month=1000, concurrent_requests=3))
WAIT_S = 60.0


class Faulty(LocalQuotas):
    """Another store with its own counts, that can be away, or hang."""

    def __init__(self) -> None:
        super().__init__()
        self.num_calls = 0
        self.is_away = self.hangs = False

    async def _fault(self) -> None:
        self.num_calls += 1
        if self.hangs:
            await asyncio.sleep(WAIT_S)
        if self.is_away:
            raise QuotaStoreDown("away")

    async def reserve(self, tenant: Tenant, *, requests: int = 1, tokens: int = 0) -> Reservation:
        await self._fault()
        return await super().reserve(tenant, requests=requests, tokens=tokens)

    async def settle(self, reservation: Reservation, tokens: int) -> None:
        await self._fault()
        await super().settle(reservation, tokens)

    async def release(self, reservation: Reservation) -> None:
        await self._fault()
        await super().release(reservation)


class Guarded:
    def __init__(self, on_failure: OnFailure, num_ingresses: int = 1, timeout_s: float = WAIT_S) -> None:
        self.store, self.now_s = Faulty(), 0.0
        self.quotas = GuardedQuotas(
            self.store, on_failure=on_failure, timeout_s=timeout_s, num_ingresses=lambda: num_ingresses,
            clock=lambda: self.now_s,
        )  # fmt: skip

    async def come_back(self) -> None:
        self.store.is_away, self.now_s = False, self.now_s + RETRY_S
        await self.quotas.release(await self.quotas.reserve(SEARCH))
        while self.quotas._late:
            await asyncio.sleep(0)
        assert self.quotas._settling is None or await self.quotas._settling is None


async def test_closed_refuses_without_asking_until_it_is_time_to_try() -> None:
    it = Guarded("closed")
    it.store.is_away = True
    for _ in range(20):
        with pytest.raises(QuotaStoreDown):
            await it.quotas.reserve(SEARCH)
    assert it.store.num_calls == 1
    it.now_s = RETRY_S
    with pytest.raises(QuotaStoreDown):
        await it.quotas.reserve(SEARCH)
    assert it.store.num_calls == 2
    await it.come_back()
    assert not it.quotas.is_down


async def test_while_one_call_tries_no_other_waits_for_it() -> None:
    it = Guarded("closed")
    it.store.is_away = True
    with pytest.raises(QuotaStoreDown):
        await it.quotas.reserve(SEARCH)
    it.now_s, it.store.hangs = RETRY_S, True
    trying = asyncio.create_task(it.quotas.reserve(SEARCH))
    await asyncio.sleep(0)
    for _ in range(20):
        with pytest.raises(QuotaStoreDown):
            await it.quotas.reserve(SEARCH)
    assert it.store.num_calls == 2
    trying.cancel()
    with pytest.raises(asyncio.CancelledError):
        await trying
    it.store.hangs = False
    await it.come_back()  # a client that left while its call tried has not shut the way


async def test_a_store_that_hangs_has_failed_when_time_is_up() -> None:
    it = Guarded("closed", timeout_s=0.01)
    it.store.hangs = True
    with pytest.raises(QuotaStoreDown):
        await it.quotas.reserve(SEARCH)
    assert it.quotas.is_down


async def test_open_keeps_this_ingresss_part_of_the_limits() -> None:
    it = Guarded("open", num_ingresses=2)
    it.store.is_away = True
    of = Tenant(name="search", limits=Limits(requests_per_minute=9))
    granted = 0
    for _ in range(20):
        try:
            await it.quotas.settle(await it.quotas.reserve(of), 0)
        except QuotaExceeded:
            continue
        granted += 1
    assert granted == 9 // 2
    one = Tenant(name="one", limits=Limits(concurrent_requests=1))
    await it.quotas.reserve(one)
    with pytest.raises(QuotaExceeded):
        await it.quotas.reserve(one)


async def test_a_refusal_of_the_store_is_an_answer() -> None:
    it = Guarded("open")
    for _ in range(3):
        await it.quotas.reserve(SEARCH)
    it.store.is_away = True
    await it.quotas.release(await it.quotas.reserve(SEARCH))  # counted here: the store is down
    assert it.quotas.is_down
    it.store.is_away, it.now_s = False, RETRY_S
    with pytest.raises(QuotaExceeded):
        await it.quotas.reserve(SEARCH)
    assert not it.quotas.is_down, "it answered"


async def test_what_ended_while_it_was_away_is_settled_when_it_is_back() -> None:
    it = Guarded("closed")
    first, second = await it.quotas.reserve(SEARCH, tokens=400), await it.quotas.reserve(SEARCH, tokens=400)
    it.store.is_away = True
    await it.quotas.settle(first, 100)
    await it.quotas.release(second)
    await it.come_back()
    left = (await it.quotas.reserve(SEARCH, tokens=0)).remaining
    assert left == {"requests_per_minute": 7, "tokens_per_month": 900, "concurrent_requests": 2}


async def test_what_was_counted_here_is_settled_here() -> None:
    it = Guarded("open")
    it.store.is_away = True
    of = Tenant(name="search", limits=Limits(concurrent_requests=1))
    first = await it.quotas.reserve(of)
    await it.come_back()
    await it.quotas.settle(first, 5)
    it.store.is_away, it.now_s = True, it.now_s + RETRY_S
    await it.quotas.reserve(of)


async def test_what_waits_to_be_settled_is_bounded_and_what_is_given_up_is_counted() -> None:
    it = Guarded("closed")
    reservation = await it.quotas.reserve(SEARCH)
    it.store.is_away = True
    for _ in range(MAX_LATE + 3):
        await it.quotas.settle(reservation, 0)
    assert it.quotas.num_unsettled == 3
    assert len(it.quotas._late) == MAX_LATE


async def test_tenants_without_such_limits_need_no_store() -> None:
    it = Guarded("closed")
    it.store.is_away = True
    reservation = await it.quotas.reserve(Tenant(name="free", limits=Limits(max_context=5)), tokens=10**9)
    await it.quotas.settle(reservation, 1)
    assert it.store.num_calls == 0


async def test_redis_is_killed_and_comes_back(tmp_path: Path) -> None:
    server = RedisServer(tmp_path)
    server.start()
    client = connect_async(server.url, None, timeout_s=10.0)
    now_s = 0.0
    quotas = GuardedQuotas(
        RedisQuotas(client), on_failure="closed", timeout_s=WAIT_S, num_ingresses=lambda: 1, clock=lambda: now_s
    )
    first = await quotas.reserve(SEARCH, tokens=100)
    server.kill()
    with pytest.raises(QuotaStoreDown):
        await quotas.reserve(SEARCH)
    await quotas.settle(first, 10)
    server.start()
    now_s = RETRY_S
    second = await quotas.reserve(SEARCH)
    assert second.remaining["requests_per_minute"] == 7, "it remembers the first"
    assert quotas._settling is not None
    await quotas._settling
    assert await client.zcard(quota_keys("search")[2]) == 1
    await client.aclose()
    server.kill()
