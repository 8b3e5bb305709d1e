"""What happens to a request when its shard goes: it goes on elsewhere, after the tokens that the client has."""

from __future__ import annotations

import asyncio
import re

import grpc
import pytest
from echo_shards import Shard, all_ready, begin, cluster, failure, join, passed_on, request, until
from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs, FinishReason
from vllm.v1.serial_utils import MsgpackEncoder

from moeray.attention_shard import link as wire
from moeray.config import ExpertsConfig
from moeray.ingress import shard_pool
from moeray.ingress.in_flight import MAX_ATTEMPTS, InFlight, Loss
from moeray.ingress.shard_pool import ShardPool
from moeray.vllm_hooks.continued_requests import generated_before
from moeray.vllm_hooks.engine_core import ShardLost, ShardUnavailable

STALLED_S = ExpertsConfig.wait_s + 1


def test_a_request_goes_on_elsewhere_after_the_tokens_that_were_passed_on() -> None:
    async def scenario() -> None:
        a, b = Shard("a"), Shard("b")
        async with cluster(a) as pool:
            await begin(pool, a, 3, 4)
            await join(pool, a, b)
            await all_ready(pool, 2)

            await a.stop()

            await until(lambda: "r+1" in b.engine.running)
            again = b.engine.running["r+1"]
            assert (again.prompt_token_ids, generated_before(again.sampling_params)) == ([7, 8], [3, 4])
            b.engine.step(5, FinishReason.STOP)
            assert await passed_on(pool) == {"r": [5]}
            assert not pool.in_flight and pool.describe()["b"]["requests"] == 0
            await a.start()
            await b.stop()

    asyncio.run(scenario())


def test_a_lost_shard_moves_its_own_requests_and_no_other() -> None:
    async def scenario() -> None:
        a, b = Shard("a"), Shard("b")
        async with cluster(a, b) as pool:
            await all_ready(pool, 2)
            for name in ("r0", "r1"):
                await pool.add(request(name))
            await until(lambda: len(a.engine.running) == 1 and len(b.engine.running) == 1)
            (on_a,), (on_b,) = a.engine.running, b.engine.running

            await a.stop()

            await until(lambda: set(b.engine.running) == {on_b, f"{on_a}+1"})
            b.engine.step(1)
            assert await passed_on(pool) == {on_a: [1], on_b: [1]}
            await a.start()

    asyncio.run(scenario())


def test_what_a_shard_still_says_of_an_earlier_attempt_never_reaches_the_client() -> None:
    async def scenario() -> None:
        a = Shard("a")
        async with cluster(a) as pool:
            await begin(pool, a, 3)
            for link in a.relay._links:  # the stream is lost, its engine lives on
                link.end(grpc.StatusCode.UNAVAILABLE, "lost")
            await until(lambda: "r+1" in a.engine.running)
            late = EngineCoreOutputs(outputs=[EngineCoreOutput("r", [9])])
            (link,) = a.relay._links
            link.put(wire.Outputs(wire.copied(MsgpackEncoder().encode(late))))
            a.engine.step(4)
            assert await passed_on(pool) == {"r": [4]}
            assert pool.in_flight["r"].token_ids == [3, 4]

    asyncio.run(scenario())


def test_a_dead_engine_gets_nothing_more_and_its_requests_move() -> None:
    async def scenario() -> None:
        a, b = Shard("a"), Shard("b")
        async with cluster(a) as pool:
            await begin(pool, a)
            await join(pool, a, b)
            await all_ready(pool, 2)
            a.relay.fail(wire.ENGINE_DEAD, "was killed by SIGSEGV")
            await until(lambda: "r+1" in b.engine.running)
            assert pool.ready_shards == ["b"]
            await b.stop()

    asyncio.run(scenario())


def test_a_shard_that_has_drained_too_long_hands_over_and_is_not_blamed() -> None:
    async def scenario() -> None:
        a, b = Shard("a"), Shard("b")
        async with cluster(a) as pool:
            await begin(pool, a, 3)
            await join(pool, a, b)
            await all_ready(pool, 2)
            a.relay.drain("going down")
            await all_ready(pool, 1)
            assert "r" in a.engine.running, "it may end there"
            a.relay.fail(wire.DRAINING, "going down")
            await until(lambda: "r+1" in b.engine.running)
            assert generated_before(b.engine.running["r+1"].sampling_params) == [3]
            assert not pool.in_flight["r"].deaths
            await b.stop()

    asyncio.run(scenario())


def test_a_shard_that_says_nothing_for_too_long_is_lost() -> None:
    async def scenario() -> None:
        a, b = Shard("a"), Shard("b")
        async with cluster(a, silence_s=1.5) as pool:
            await begin(pool, a, 3)
            await join(pool, a, b)
            await all_ready(pool, 2)
            a._pump.cancel()  # its loop runs, its socket lives: it only says nothing
            await until(lambda: "r+1" in b.engine.running)
            assert "no sign of life" in str(pool.describe()["a"]["why"])
            await b.stop()

    asyncio.run(scenario())


def test_a_shard_that_refuses_is_left_alone_for_a_moment() -> None:
    async def scenario() -> None:
        a = Shard("a")
        async with cluster(a) as pool:
            await all_ready(pool, 1)
            a.relay.not_ready = "no expert groups"
            await pool.add(request("r"))
            await until(lambda: pool.in_flight["r"].shard == "" and pool.in_flight["r"].attempts == 1)
            a.relay.not_ready = None
            await until(lambda: "r+1" in a.engine.running)
            assert not pool.in_flight["r"].deaths

    asyncio.run(scenario())


def test_what_the_engine_aborts_by_itself_goes_on_elsewhere() -> None:
    async def scenario() -> None:
        a = Shard("a")
        async with cluster(a) as pool:
            await begin(pool, a, 3)
            end = EngineCoreOutput("r", [], finish_reason=FinishReason.ABORT)
            a.engine._steps.put_nowait(EngineCoreOutputs(outputs=[end]))
            await until(lambda: "r+1" in a.engine.running)

    asyncio.run(scenario())


def test_only_attempts_without_a_token_between_them_count() -> None:
    known = InFlight(request("r"), 0.0)
    for _ in range(2 * MAX_ATTEMPTS):
        known.start_on("a")
        known.record(EngineCoreOutput("r", [7]), 0.0)
        known.leave(Loss.LEFT, "drained")
        assert known.why_not_again("a", Loss.LEFT, "drained", stalled_s=0.0, stall_s=120.0) is None
    for _ in range(MAX_ATTEMPTS):
        known.start_on("a")
        known.leave(Loss.LEFT, "drained")
    assert isinstance(known.why_not_again("a", Loss.LEFT, "drained", stalled_s=0.0, stall_s=120.0), ShardLost)


async def stalled(pool: ShardPool, shard: Shard, request_id: str) -> None:
    """This request has had no token for STALLED_S, and the shard's engine has waited for experts as long."""
    shard.relay.experts_awaited(True)
    assert shard.relay._waiting_since is not None
    shard.relay._waiting_since -= STALLED_S
    await until(lambda: shard.name in pool._waiting_since)
    pool.in_flight[request_id].progress_at -= STALLED_S


def test_a_request_that_waited_for_experts_for_the_whole_budget_is_not_tried_again_and_says_why() -> None:
    async def scenario() -> None:
        a, b = Shard("a"), Shard("b")
        async with cluster(a) as pool:
            await begin(pool, a, 3)
            await pool.add(request("fresh"))
            await until(lambda: "fresh" in a.engine.running)
            await stalled(pool, a, "r")
            await join(pool, a, b)
            await all_ready(pool, 2)
            a.relay.fail(wire.ENGINE_DEAD, "no copy of expert 7 came back")
            failed = await failure(pool)
            assert failed.request_id == "r" and isinstance(failed.error, ShardUnavailable)
            assert failed.error.http_status == 503 and failed.error.retry_after_s >= 1
            for word in ("shard a", "no copy of expert 7 came back", "experts.wait_s is 120"):
                assert word in str(failed.error)
            waited = re.search(r"waited (\d+) s for experts", str(failed.error))
            assert waited is not None and int(waited[1]) >= STALLED_S
            await until(lambda: set(b.engine.running) == {"fresh+1"})
            await b.stop()

    asyncio.run(scenario())


def test_a_request_that_waits_for_its_turn_or_its_prefill_goes_on_however_long_it_had_no_token() -> None:
    async def scenario() -> None:
        a, b = Shard("a"), Shard("b")
        async with cluster(a) as pool:
            await begin(pool, a)
            await pool.add(request("queued"))
            await until(lambda: "queued" in a.engine.running)
            pool.in_flight["queued"].progress_at -= STALLED_S  # a long prefill, or a queue
            a.engine.step(3, only="r")
            assert await passed_on(pool) == {"r": [3]}
            await join(pool, a, b)
            await all_ready(pool, 2)
            a.relay.fail(wire.ENGINE_DEAD, "killed")
            await until(lambda: set(b.engine.running) == {"r+1", "queued+1"})
            await b.stop()

    asyncio.run(scenario())


def test_a_token_renews_the_budget() -> None:
    async def scenario() -> None:
        a, b = Shard("a"), Shard("b")
        async with cluster(a) as pool:
            await begin(pool, a)
            await stalled(pool, a, "r")
            a.engine.step(3)
            assert await passed_on(pool) == {"r": [3]}
            await join(pool, a, b)
            await all_ready(pool, 2)
            await a.stop()
            await until(lambda: "r+1" in b.engine.running)
            await a.start()
            await b.stop()

    asyncio.run(scenario())


def test_what_a_living_shard_hands_over_goes_on_however_long_it_had_no_token() -> None:
    async def scenario() -> None:
        a, b = Shard("a"), Shard("b")
        async with cluster(a) as pool:
            await begin(pool, a)
            await stalled(pool, a, "r")
            await join(pool, a, b)
            await all_ready(pool, 2)
            a.relay.drain("going down")
            a.relay.fail(wire.DRAINING, "going down")
            await until(lambda: "r+1" in b.engine.running)
            await b.stop()

    asyncio.run(scenario())


def test_a_request_that_no_shard_takes_fails_after_so_many_attempts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shard_pool, "PAUSE_S", 0.01)

    async def scenario() -> None:
        a = Shard("a")
        async with cluster(a) as pool:
            await all_ready(pool, 1)
            a.relay.not_ready = "no expert groups"
            await pool.add(request("r"))
            failed = await failure(pool)
            assert isinstance(failed.error, ShardUnavailable) and "no expert groups" in str(failed.error)
            assert 5 <= pool.continued < 100, "neither given up at once nor sent round for long"

    asyncio.run(scenario())
