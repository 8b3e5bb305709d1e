"""A request that ends shards is found out, and takes no other along."""

from __future__ import annotations

import asyncio

from echo_shards import Shard, all_ready, cluster, failure, passed_on, request, until

from moeray.attention_shard import link as wire
from moeray.ingress.in_flight import MAX_DEATHS
from moeray.vllm_hooks.engine_core import EndsShards


def test_a_request_that_ends_every_shard_fails_and_says_what_it_did() -> None:
    async def scenario() -> None:
        shards = [Shard(name) for name in "abcd"]
        async with cluster(*shards) as pool:
            await all_ready(pool, 4)
            await pool.add(request("poison"))
            for _ in range(MAX_DEATHS):
                await until(lambda: any(shard.engine.running for shard in shards))
                (victim,) = [shard for shard in shards if shard.engine.running]
                victim.engine.running.clear()
                victim.relay.fail(wire.ENGINE_DEAD, "was killed by SIGSEGV")
            failed = await failure(pool)
            assert isinstance(failed.error, EndsShards) and str(failed.error).count("SIGSEGV") == MAX_DEATHS
            assert failed.error.http_status == 500 and len(pool.ready_shards) == 1

    asyncio.run(scenario())


def test_a_request_that_gets_a_token_between_two_deaths_is_not_suspected() -> None:
    async def scenario() -> None:
        shards = [Shard(name) for name in "abcde"]
        async with cluster(*shards) as pool:
            await all_ready(pool, 5)
            await pool.add(request("r"))
            for _ in range(MAX_DEATHS + 1):
                await until(lambda: any(shard.engine.running for shard in shards))
                (victim,) = [shard for shard in shards if shard.engine.running]
                victim.engine.step(1)
                assert await passed_on(pool) == {"r": [1]}
                victim.engine.running.clear()
                victim.relay.fail(wire.ENGINE_DEAD, "was killed by SIGKILL")
            await until(lambda: any(shard.engine.running for shard in shards))

    asyncio.run(scenario())


def test_suspects_run_one_at_a_time_until_they_have_a_token() -> None:
    async def scenario() -> None:
        a = Shard("a")
        async with cluster(a) as pool:
            await all_ready(pool, 1)
            for name in ("r0", "r1"):
                await pool.add(request(name))
            for _ in range(MAX_DEATHS - 1):
                await until(lambda: len(a.engine.running) == 2)
                await a.stop()
                await all_ready(pool, 0)
                a.engine.running.clear()
                await a.start()

            await until(lambda: bool(a.engine.running))
            await pool.add(request("innocent"))
            await until(lambda: "innocent" in a.engine.running)
            assert set(a.engine.running) == {"r0+2", "innocent"}, "the other suspect waits"
            a.engine.step(1)
            assert await passed_on(pool) == {"r0": [1], "innocent": [1]}
            await until(lambda: set(a.engine.running) == {"r0+2", "r1+2", "innocent"})

    asyncio.run(scenario())
