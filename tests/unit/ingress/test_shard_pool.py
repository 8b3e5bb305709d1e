"""The pool and its links against real relays on loopback; only the engines are scripted."""

from __future__ import annotations

import asyncio

import pytest
from echo_shards import INGRESS, NEED, Shard, all_ready, begin, cluster, failure, passed_on, request, until
from vllm.v1.engine import EngineCoreOutputs, FinishReason

from moeray.ingress.shard_pool import ShardPool
from moeray.vllm_hooks.continued_requests import GENERATED
from moeray.vllm_hooks.engine_core import NoShardReady


def test_requests_go_to_the_least_loaded_shard() -> None:
    async def scenario() -> None:
        a, b = Shard("a"), Shard("b")
        async with cluster(a, b) as pool:
            await all_ready(pool, 2)
            for index in range(6):
                await pool.add(request(f"r{index}"))
            await until(lambda: len(a.engine.running) == 3 and len(b.engine.running) == 3)
            a.engine.step(1, FinishReason.STOP)
            await pool.next_event()
            await pool.add(request("r6"))
            await pool.add(request("r7"))
            await until(lambda: len(a.engine.running) == 2)
            assert len(b.engine.running) == 3

    asyncio.run(scenario())


def test_the_request_arrives_as_it_was_made_and_its_tokens_are_remembered() -> None:
    async def scenario() -> None:
        a = Shard("a")
        async with cluster(a) as pool:
            await all_ready(pool, 1)
            await pool.add(request("r"))
            await until(lambda: "r" in a.engine.running)
            assert a.engine.running["r"] == request("r")
            for token in (3, 4):
                a.engine.step(token)
                step = await asyncio.wait_for(pool.next_event(), 5)
                assert isinstance(step, EngineCoreOutputs) and step.outputs[0].new_token_ids == [token]
            assert pool.in_flight["r"].token_ids == [3, 4] and pool.in_flight["r"].request.prompt_token_ids == [7, 8]
            a.engine.step(5, FinishReason.LENGTH)
            await pool.next_event()
            assert not pool.in_flight

    asyncio.run(scenario())


def test_a_client_cannot_pretend_to_have_tokens() -> None:
    async def scenario() -> None:
        a = Shard("a")
        async with cluster(a) as pool:
            await all_ready(pool, 1)
            sent = request("r")
            sent.sampling_params.extra_args = {GENERATED: [1, 2], "other": 3}
            await pool.add(sent)
            await until(lambda: "r" in a.engine.running)
            assert a.engine.running["r"].sampling_params.extra_args == {"other": 3}

    asyncio.run(scenario())


def test_without_a_shard_no_request_is_admitted_and_the_error_says_why() -> None:
    async def scenario() -> None:
        pool = ShardPool(INGRESS)
        with pytest.raises(NoShardReady, match="no attention shard has joined"):
            pool.admit(NEED)
        dead = Shard("dead")
        await dead.start()
        await dead.stop()
        await pool.set_shards({"dead": dead.address})
        with pytest.raises(NoShardReady, match=r"\(dead: "):
            pool.admit(NEED)
        await pool.close()

    asyncio.run(scenario())


def test_a_shard_that_comes_back_is_used_again() -> None:
    async def scenario() -> None:
        a = Shard("a")
        async with cluster(a) as pool:
            await all_ready(pool, 1)
            await a.stop()
            await all_ready(pool, 0)
            await a.start()
            await all_ready(pool, 1)
            await pool.add(request("r"))
            await until(lambda: "r" in a.engine.running)

    asyncio.run(scenario())


def test_an_abort_reaches_the_engine_and_later_output_is_ignored() -> None:
    async def scenario() -> None:
        a = Shard("a")
        async with cluster(a) as pool:
            await all_ready(pool, 1)
            await pool.add(request("r"))
            await until(lambda: "r" in a.engine.running)
            await pool.abort(["r", "unknown"])
            await until(lambda: not a.engine.running)
            assert not pool.in_flight and pool.describe()["a"]["requests"] == 0

    asyncio.run(scenario())


def test_shards_join_and_leave_while_requests_run() -> None:
    async def scenario() -> None:
        a, b = Shard("a"), Shard("b")
        async with cluster(a) as pool:
            await b.start()
            await all_ready(pool, 1)
            await pool.add(request("r0"))
            await pool.set_shards({"a": a.address, "b": b.address})
            await all_ready(pool, 2)
            await pool.add(request("r1"))
            await until(lambda: "r1" in b.engine.running)
            await pool.set_shards({"b": b.address})
            assert pool.ready_shards == ["b"] and "r0" in a.engine.running, "it takes nothing new and goes on"
            a.engine.step(5, FinishReason.STOP)
            step = await asyncio.wait_for(pool.next_event(), 5)
            assert isinstance(step, EngineCoreOutputs) and step.outputs[0].request_id == "r0"
            await until(lambda: list(pool.describe()) == ["b"])
            await b.stop()

    asyncio.run(scenario())


def test_an_idle_shard_that_leaves_or_moves_is_let_go_at_once() -> None:
    async def scenario() -> None:
        a, b, elsewhere = Shard("a"), Shard("b"), Shard("b")
        async with cluster(a, b) as pool:
            await all_ready(pool, 2)
            await elsewhere.start()
            await pool.set_shards({"b": elsewhere.address})
            assert {name: each["address"] for name, each in pool.describe().items()} == {"b": elsewhere.address}
            await all_ready(pool, 1)
            await pool.add(request("r"))
            await until(lambda: "r" in elsewhere.engine.running)
            await elsewhere.stop()

    asyncio.run(scenario())


def test_a_shard_that_is_named_again_as_its_last_request_ends_stays() -> None:
    async def scenario() -> None:
        a, b = Shard("a"), Shard("b")
        async with cluster(a) as pool:
            await b.start()
            await begin(pool, a)
            await pool.set_shards({"b": b.address})
            await pool.abort(["r"])
            await pool.set_shards({"a": a.address, "b": b.address})
            await asyncio.sleep(0)
            await all_ready(pool, 2)
            await b.stop()

    asyncio.run(scenario())


def test_a_request_that_cannot_be_sent_leaves_nothing_behind() -> None:
    async def scenario() -> None:
        a = Shard("a")
        async with cluster(a) as pool:
            await all_ready(pool, 1)
            bad = request("bad")
            bad.session_id = "\ud800"
            with pytest.raises(UnicodeEncodeError):
                await pool.add(bad)
            assert not pool.in_flight and pool.describe()["a"]["requests"] == 0
            await pool.add(request("good"))
            await until(lambda: list(a.engine.running) == ["good"])

    asyncio.run(scenario())


def test_a_draining_shard_gets_nothing_new() -> None:
    async def scenario() -> None:
        a, b = Shard("a"), Shard("b")
        async with cluster(a, b) as pool:
            await all_ready(pool, 2)
            a.relay.drain("going down")
            await all_ready(pool, 1)
            for index in range(3):
                await pool.add(request(f"r{index}"))
            await until(lambda: len(b.engine.running) == 3)

    asyncio.run(scenario())


def test_a_shard_of_another_version_is_refused_by_name() -> None:
    async def scenario() -> None:
        old = Shard("old", vllm="0.31.0")
        async with cluster(old) as pool:
            await until(lambda: pool.describe()["old"]["state"] == "refused")
            with pytest.raises(NoShardReady, match=r"vllm differs.*0\.31\.0.*0\.32\.0"):
                pool.check_ready()

    asyncio.run(scenario())


def test_what_the_front_does_not_read_stays_with_the_shard_and_is_not_lost() -> None:
    steps = 1500

    async def scenario() -> None:
        a = Shard("a")
        async with cluster(a) as pool:
            await all_ready(pool, 1)
            await pool.add(request("r"))
            await until(lambda: "r" in a.engine.running)
            for token in range(steps):
                a.engine.step(token)
            passed = pool.in_flight["r"].token_ids
            seen = -1
            while len(passed) > seen or not passed:
                seen = len(passed)
                await asyncio.sleep(0.5)
            assert len(passed) < steps, "the queue of what waits for the front has no bound"
            for token in range(steps):
                assert await passed_on(pool) == {"r": [token]}

    asyncio.run(scenario())


def test_a_pool_that_has_closed_takes_nothing_and_opens_no_link() -> None:
    async def scenario() -> None:
        a = Shard("a")
        async with cluster(a) as pool:
            await begin(pool, a)
            await pool.close()
            assert isinstance((await failure(pool)).error, NoShardReady)
            await pool.add(request("late"))
            late = await failure(pool)
            assert late.request_id == "late" and "stopping" in str(late.error) and not pool.in_flight
            await pool.set_shards({"a": a.address})
            assert pool.describe() == {}
            with pytest.raises(NoShardReady, match="stopping"):
                pool.admit(NEED)

    asyncio.run(scenario())
