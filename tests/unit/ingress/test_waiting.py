"""Requests that find no shard wait for one, and not for ever."""

from __future__ import annotations

import asyncio

import pytest
from echo_shards import NEED, Shard, all_ready, begin, cluster, failure, passed_on, request, until

from moeray.vllm_hooks.engine_core import NoShardReady


def test_a_request_waits_for_a_shard_and_then_goes_on() -> None:
    async def scenario() -> None:
        a = Shard("a")
        async with cluster(a) as pool:
            await begin(pool, a, 3)
            await a.stop()
            await all_ready(pool, 0)
            pool.admit(NEED)
            await pool.add(request("new"))
            a.engine.running.clear()
            await a.start()
            await until(lambda: set(a.engine.running) == {"r+1", "new"})
            a.engine.step(4)
            assert await passed_on(pool) == {"r": [4], "new": [4]}

    asyncio.run(scenario())


def test_a_request_that_waits_too_long_fails_with_the_state_of_the_shards() -> None:
    async def scenario() -> None:
        a = Shard("a")
        async with cluster(a, wait_s=0.3) as pool:
            await begin(pool, a, 3)
            await a.stop()
            failed = await failure(pool)
            assert failed.request_id == "r" and isinstance(failed.error, NoShardReady)
            assert "0.3 s" in str(failed.error) and "(a: " in str(failed.error) and not pool.in_flight
            with pytest.raises(NoShardReady, match=r"\(a: "):
                pool.admit(NEED)
            await a.start()

    asyncio.run(scenario())


def test_a_request_that_waits_can_be_aborted() -> None:
    async def scenario() -> None:
        a = Shard("a")
        async with cluster(a) as pool:
            await begin(pool, a)
            await a.stop()
            await all_ready(pool, 0)
            await pool.abort(["r"])
            a.engine.running.clear()
            await a.start()
            await all_ready(pool, 1)
            await pool.add(request("r2"))
            await until(lambda: bool(a.engine.running))
            assert list(a.engine.running) == ["r2"] == list(pool.in_flight)

    asyncio.run(scenario())
