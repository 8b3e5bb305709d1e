"""A tenant's requests through the pool: priority, salt, reservation, record, over a pool that a test drives."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import AsyncGenerator
from typing import Any

import pytest
from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs, FinishReason

from moeray.ingress.tenants.call import Call
from moeray.ingress.tenants.tenant_pool import TenantPool
from moeray.ingress.tenants.tenants import LOWEST, Tenants
from moeray.tenancy import (
    Limits,
    LocalQuotas,
    Principal,
    QuotaExceeded,
    QuotaStoreDown,
    Reservation,
    Tenant,
    UsageRecord,
    split_priority,
)
from moeray.vllm_hooks.admission import Need, Refused, begun, keep_place
from moeray.vllm_hooks.engine_core import NoShardReady, RequestFailed

MODEL, SECRET = "m", bytes(32)


class Place:
    """Of the pool behind. Attributes: left: how often it was given back."""

    max_unread_s = 60.0

    def __init__(self, need: Need) -> None:
        self.need, self.left = need, 0

    async def begin(self) -> None: ...

    def answered(self) -> None: ...

    def leave(self, error: BaseException | None = None) -> None:
        self.left += 1


class Pool:
    """Keeps what reaches it, says what it is told to."""

    def __init__(self) -> None:
        self.admitted: list[Place] = []
        self.added: list[Any] = []
        self.events: asyncio.Queue[EngineCoreOutputs | RequestFailed] = asyncio.Queue()
        self.refuses = False

    def check_ready(self) -> None: ...

    def admit(self, need: Need) -> Place:
        if self.refuses:
            raise NoShardReady("none")
        self.admitted.append(Place(need))
        return self.admitted[-1]

    async def add(self, request: Any) -> None:
        self.added.append(request)

    async def abort(self, request_ids: list[str]) -> None: ...

    async def next_event(self) -> EngineCoreOutputs | RequestFailed:
        return await self.events.get()

    def say(self, request_id: str, *token_ids: int, ends: bool = False) -> None:
        finish = FinishReason.LENGTH if ends else None
        output = EngineCoreOutput(request_id, list(token_ids), finish_reason=finish)
        self.events.put_nowait(EngineCoreOutputs(outputs=[output]))


class Usage:
    """Keeps records."""

    def __init__(self) -> None:
        self.records: list[UsageRecord] = []

    def record(self, record: UsageRecord) -> None:
        self.records.append(record)

    def close(self) -> None: ...


class Quotas(LocalQuotas):
    """In process, with a list of what ended how."""

    def __init__(self) -> None:
        super().__init__()
        self.ended: list[tuple[str, int]] = []

    async def settle(self, reservation: Reservation, tokens: int) -> None:
        self.ended.append(("settled", tokens))
        await super().settle(reservation, tokens)

    async def release(self, reservation: Reservation) -> None:
        self.ended.append(("released", reservation.tokens))
        await super().release(reservation)


class Desk:
    """Tenants in front of a pool."""

    def __init__(self) -> None:
        self.behind, self.usage, self.quotas = Pool(), Usage(), Quotas()
        registry: Any = None
        usage: Any = self.usage
        self.tenants = Tenants(MODEL, registry, self.quotas, usage, SECRET, asyncio.get_running_loop())
        self.pool = TenantPool(self.behind, self.tenants)

    def call(self, tenant: Tenant) -> Call:
        return Call(self.tenants, Principal(tenant, "00000000000a", "key"), "http")

    def stream(self, need: Need) -> AsyncGenerator[int, None]:
        """As FrontLLM.generate: a place in the call, the request in the first step, then two tokens."""
        place = self.pool.admit(need)

        async def outputs() -> AsyncGenerator[int, None]:
            await self.pool.add(_Request(need.request_id))
            for number in range(2):
                self.behind.say(need.request_id, number, ends=number == 1)
                await self.pool.next_event()
                yield number

        return keep_place(place, outputs())


class _Request:
    def __init__(self, request_id: str) -> None:
        self.request_id = request_id


def need(request_id: str = "r", num_prompt: int = 10, num_answer: int = 5, **more: Any) -> Need:
    return Need(request_id, num_prompt, num_answer, **more)


async def settled(desk: Desk) -> None:
    for _ in range(5):
        await asyncio.sleep(0)
    assert not desk.tenants._settling


def test_a_way_in_without_a_door_is_closed() -> None:
    async def scenario() -> None:
        desk = Desk()
        with pytest.raises(Refused) as refused:
            desk.pool.admit(need())
        assert refused.value.http_status == 401 and not desk.behind.admitted

    asyncio.run(scenario())


def test_what_was_not_used_is_given_back_and_recorded() -> None:
    async def scenario() -> None:
        desk = Desk()
        call = desk.call(Tenant("a", limits=Limits(tokens_per_minute=100)))
        with call.handled():
            assert [number async for number in desk.stream(need(num_answer=50))] == [0, 1]
            assert not desk.usage.records, "its door is not shut yet"
        await settled(desk)
        assert desk.quotas.ended == [("settled", 12)] and call.rate_limits()["x-ratelimit-remaining-tokens"] == "40"
        record = desk.usage.records[0]
        assert (record.tenant, record.prompt_tokens, record.completion_tokens, record.outcome) == ("a", 10, 2, "ok")
        assert desk.behind.admitted[0].left == 1

    asyncio.run(scenario())


def test_several_prompts_are_one_request_with_all_their_tokens() -> None:
    async def scenario() -> None:
        desk = Desk()
        tenant = Tenant("a", limits=Limits(requests_per_minute=1, tokens_per_minute=100))
        with desk.call(tenant).handled():
            streams = [desk.stream(need(f"r{number}")) for number in range(3)]
            await asyncio.gather(*(_read(stream) for stream in streams))
        await settled(desk)
        assert desk.quotas.ended == [("settled", 36)]
        assert len(desk.usage.records) == 1 and desk.usage.records[0].completion_tokens == 6
        with desk.call(tenant).handled(), pytest.raises(Refused, match="requests_per_minute"):
            await _read(desk.stream(need()))

    asyncio.run(scenario())


def test_a_stream_is_refused_before_it_is_returned() -> None:
    async def scenario() -> None:
        desk = Desk()

        async def handler() -> AsyncGenerator[int, None]:
            return desk.stream(need(num_answer=50))

        call = desk.call(Tenant("a", limits=Limits(tokens_per_minute=20)))
        with call.handled():
            with pytest.raises(Refused) as refused:
                await begun(handler)()
            assert refused.value.http_status == 429 and refused.value.retry_after_s is None
        gc.collect()
        assert desk.behind.admitted[0].left and not desk.usage.records and not desk.behind.added

    asyncio.run(scenario())


def test_a_client_that_goes_away_is_charged_for_what_was_made() -> None:
    async def scenario() -> None:
        desk = Desk()
        with desk.call(Tenant("a")).handled():
            stream = desk.stream(need())
            assert await anext(stream) == 0
            await stream.aclose()
        await settled(desk)
        record = desk.usage.records[0]
        assert (record.outcome, record.completion_tokens, desk.quotas.ended) == ("aborted", 1, [("settled", 11)])

    asyncio.run(scenario())


def test_a_request_that_the_cluster_failed_is_free() -> None:
    async def scenario() -> None:
        desk = Desk()
        tenant = Tenant("a", limits=Limits(requests_per_minute=1))

        async def fails() -> AsyncGenerator[int, None]:
            raise NoShardReady("gone")
            yield 0

        with desk.call(tenant).handled(), pytest.raises(NoShardReady):
            await _read(keep_place(desk.pool.admit(need()), fails()))
        await settled(desk)
        assert desk.quotas.ended == [("released", 15)]
        record = desk.usage.records[0]
        assert (record.outcome, record.prompt_tokens, record.completion_tokens) == ("NoShardReady", 0, 0)
        with desk.call(tenant).handled():
            await _read(desk.stream(need()))

    asyncio.run(scenario())


def test_a_store_that_is_away_is_503_with_a_time_to_try_again() -> None:
    class Down(LocalQuotas):
        async def reserve(self, tenant: Tenant, *, requests: int = 1, tokens: int = 0) -> Reservation:
            raise QuotaStoreDown("away")

    async def scenario() -> None:
        desk = Desk()
        desk.tenants.quotas = Down()
        with desk.call(Tenant("a")).handled(), pytest.raises(Refused) as refused:
            await _read(desk.stream(need()))
        assert (refused.value.http_status, refused.value.retry_after_s) == (503, 1)

    asyncio.run(scenario())


def test_each_tenant_has_a_cache_of_its_own_and_a_clients_salt_divides_it() -> None:
    async def scenario() -> None:
        desk = Desk()
        salts = {}
        for name, wanted in (("a", None), ("b", None), ("a", "x"), ("b", "x")):
            with desk.call(Tenant(name)).handled():
                salts[name, wanted] = desk.pool.admit(need(cache_salt=wanted)).need.cache_salt
        assert len(set(salts.values())) == 4 and None not in salts.values()

    asyncio.run(scenario())


def test_a_client_may_lower_its_class_and_never_raise_it() -> None:
    async def scenario() -> None:
        desk = Desk()
        for wanted, group in ((0, 3), (-5, 3), (7, 10), (1 << 40, 3 + LOWEST)):
            with desk.call(Tenant("a", priority=3)).handled():
                assert split_priority(desk.pool.admit(need(priority=wanted)).need.priority)[0] == group

    asyncio.run(scenario())


def test_who_has_asked_for_much_stands_behind_who_has_not() -> None:
    async def scenario() -> None:
        desk = Desk()

        def priority(name: str, num_answer: int) -> int:
            with desk.call(Tenant(name)).handled():
                return desk.pool.admit(need(num_answer=num_answer)).need.priority

        greedy = [priority("greedy", 1000) for _ in range(3)]
        assert greedy == sorted(set(greedy))
        assert priority("modest", 10) < greedy[1]
        desk.tenants.begun(greedy)  # as the shards report it
        assert priority("newcomer", 10) >= greedy[2], "no credit for the time when it did not ask"

    asyncio.run(scenario())


def test_a_place_that_the_pool_refuses_costs_no_share() -> None:
    async def scenario() -> None:
        desk = Desk()
        tenant = Tenant("a")
        desk.behind.refuses = True
        for _ in range(3):
            with desk.call(tenant).handled(), pytest.raises(NoShardReady):
                desk.pool.admit(need(num_answer=1000))
        desk.behind.refuses = False
        with desk.call(tenant).handled():
            place = desk.pool.admit(need())
        assert split_priority(place.need.priority)[1] <= 3

    asyncio.run(scenario())


def test_what_a_tenant_may_not_have_never_reaches_the_pool() -> None:
    async def scenario() -> None:
        desk = Desk()
        for tenant, field in (
            (Tenant("a", models=("other",)), "model"),
            (Tenant("b", limits=Limits(max_context=14)), "max_tokens"),
        ):
            with desk.call(tenant).handled(), pytest.raises(Refused) as refused:
                desk.pool.admit(need())
            assert (refused.value.http_status, refused.value.parameter) == (403, field)
        assert not desk.behind.admitted

    asyncio.run(scenario())


def test_the_pool_keeps_nothing_of_requests_that_have_ended() -> None:
    async def scenario() -> None:
        desk = Desk()
        with desk.call(Tenant("a")).handled():
            await _read(desk.stream(need("ends")))
            for number, stream in enumerate([desk.stream(need("aborted")), desk.stream(need("failed"))]):
                await anext(stream)
                assert len(desk.pool._places) == 1 + number
            await desk.pool.abort(["aborted"])
            desk.behind.events.put_nowait(RequestFailed("failed", NoShardReady("gone")))
            await desk.pool.next_event()
        assert not desk.pool._places

    asyncio.run(scenario())


async def _read(stream: AsyncGenerator[int, None]) -> list[int]:
    return [number async for number in stream]


def test_a_refusal_tells_what_is_left() -> None:
    async def scenario() -> None:
        desk = Desk()
        call = desk.call(Tenant("a", limits=Limits(requests_per_minute=7, tokens_per_minute=3)))
        with call.handled(), pytest.raises(Refused):
            await _read(desk.stream(need()))
        assert isinstance(call.refusal, QuotaExceeded)
        limits = call.rate_limits()
        assert (limits["x-ratelimit-remaining-requests"], limits["x-ratelimit-limit-tokens"]) == ("7", "3")

    asyncio.run(scenario())
