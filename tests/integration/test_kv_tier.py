"""KV blocks that engines share, in whole engines: the same bits with and without, and through faults of a store."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from engine_runs import Answer, Engine, Topology, prompt_of, running_engine
from redis_server import RedisServer, missing, nobody

from moeray.config import KvCacheConfig
from moeray.tiny import checkpoint_path
from moeray.vllm_hooks import kv_connector

LENGTH = 1100  # four blocks of 256 tokens and a rest
SETTLE_S = 30.0
HOST_BYTES, STAGING_BYTES = 64 << 20, 16 << 20

pytestmark = pytest.mark.timeout(300)


@contextlib.contextmanager
def engine_with(kv_cache: KvCacheConfig | None) -> Iterator[Engine]:
    with running_engine(checkpoint_path(), kv_cache=kv_cache) as engine:
        engine.connect(Topology("one", 1).placement(engine.checkpoint, 1), [])
        yield engine


def ask(engine: Engine, prompt: list[int], max_tokens: int = 4) -> Answer:
    name = engine.add(prompt, max_tokens)
    return engine.finish()[name]


def settle(engine: Engine) -> None:
    """Until the stores have everything."""
    deadline = time.monotonic() + SETTLE_S
    while engine.scheduler.connector.has_pending_push_work():
        engine.engine.engine_core.engine_core.step_fn()
        assert time.monotonic() < deadline


def forget(engine: Engine) -> None:
    """Empty device and staging region; the stores keep theirs."""
    settle(engine)
    assert engine.engine.reset_prefix_cache(reset_connector=True)


def warm(engine: Engine, seed: int = 90) -> None:
    """Let it learn what computing and fetching cost: otherwise it does not fetch."""
    for again in range(3):
        ask(engine, prompt_of(700, seed + again))
        forget(engine)
        ask(engine, prompt_of(700, seed + again), 1)
        settle(engine)


def report(engine: Engine) -> dict[str, Any]:
    found: dict[str, Any] = engine.engine.collective_rpc("moeray_kv_cache")[0]
    return found


@pytest.fixture(scope="module")
def alone() -> Iterator[dict[int, Answer]]:
    """What an engine without any store answers, by the prompt's seed."""
    with engine_with(None) as engine:
        yield {seed: ask(engine, prompt_of(LENGTH, seed)) for seed in range(8)}


@pytest.fixture
def redis(tmp_path: Path) -> Iterator[RedisServer]:
    if (why := missing()) is not None:
        pytest.skip(why)
    server = RedisServer(tmp_path, appendonly="no", maxmemory="100mb", maxmemory_policy="allkeys-lru")
    server.start()
    yield server
    server.kill()


def same(found: Answer, wanted: Answer) -> bool:
    return (found.tokens, found.logprobs) == (wanted.tokens, wanted.logprobs)


@pytest.mark.parametrize("store", ["node", "redis"])
def test_what_one_engine_computed_another_fetches_with_the_same_bits(
    store: str, tmp_path: Path, redis: RedisServer, alone: dict[int, Answer]
) -> None:
    kv_cache = (
        KvCacheConfig(host_bytes=HOST_BYTES, host_directory=str(tmp_path / "kv"), staging_bytes=STAGING_BYTES)
        if store == "node"
        else KvCacheConfig(host_bytes=0, redis_url=redis.url, staging_bytes=STAGING_BYTES, timeout_s=5.0)
    )
    with engine_with(kv_cache) as first:
        for seed in range(4):
            assert same(ask(first, prompt_of(LENGTH, seed)), alone[seed])
        settle(first)
    with engine_with(kv_cache) as second:
        warm(second)
        for seed in range(4):
            answer = ask(second, prompt_of(LENGTH, seed))
            assert same(answer, alone[seed])
            assert answer.num_cached == 1024, report(second)
        assert report(second)["choices"]["faster"] >= 4


def test_a_prefix_that_does_not_fit_into_the_staging_region_is_not_fetched_in_vain(
    tmp_path: Path, alone: dict[int, Answer]
) -> None:
    """Its first blocks would be there when its last ones have pushed them out."""
    roomy = KvCacheConfig(host_bytes=HOST_BYTES, host_directory=str(tmp_path), staging_bytes=STAGING_BYTES)
    with engine_with(roomy) as first:
        ask(first, prompt_of(LENGTH, seed=1))
        settle(first)
    with engine_with(replace(roomy, staging_bytes=2 << 20)) as second:  # 22 blocks; the prompt's prefix is 26
        (tier,) = second.scheduler.connector.tiers
        ask(second, prompt_of(LENGTH, seed=2))
        tier.cost.observe(tier.block_size_bytes, 1e-4)  # a fetch would be chosen
        for _ in range(3):
            assert same(ask(second, prompt_of(LENGTH, seed=1)), alone[1])
            forget(second)
        assert report(second)["choices"] == {"nothing": 4} and tier.counts.fetched_blocks == 0


def test_the_next_turn_of_a_chat_fetches_the_last_turns_answer(tmp_path: Path) -> None:
    kv_cache = KvCacheConfig(host_bytes=HOST_BYTES, host_directory=str(tmp_path), staging_bytes=STAGING_BYTES)
    with engine_with(kv_cache) as engine:
        warm(engine)
        prompt = prompt_of(500, seed=20)
        answer = ask(engine, prompt, 60)
        forget(engine)
        turn = [*prompt, *answer.tokens, *prompt_of(90, seed=21)]
        assert ask(engine, turn).num_cached == 512  # twelve of its tokens were generated


def test_prompts_that_begin_alike_and_end_differently_share_their_beginning(tmp_path: Path) -> None:
    """The second one finds the beginning, without the windows to use it, and leaves them for all that come."""
    kv_cache = KvCacheConfig(host_bytes=HOST_BYTES, host_directory=str(tmp_path), staging_bytes=STAGING_BYTES)
    with engine_with(kv_cache) as engine:
        warm(engine)
        cached = []
        for tail in range(4):
            cached.append(ask(engine, prompt_of(800, seed=30) + prompt_of(300, seed=31 + tail)).num_cached)
            forget(engine)
        assert cached == [0, 0, 768, 768]


def test_another_tenants_salt_finds_nothing(tmp_path: Path) -> None:
    from vllm import SamplingParams

    kv_cache = KvCacheConfig(host_bytes=HOST_BYTES, host_directory=str(tmp_path), staging_bytes=STAGING_BYTES)
    with engine_with(kv_cache) as engine:
        warm(engine)
        cached = {}
        for name, salt in (("a1", "a"), ("a2", "a"), ("b1", "b")):
            sampling = SamplingParams(temperature=0, max_tokens=1, logprobs=0)
            prompt = {"prompt_token_ids": prompt_of(LENGTH, seed=40), "cache_salt": salt}
            engine.engine.add_request(name, prompt, sampling)
            while engine.engine.has_unfinished_requests():
                for output in engine.engine.step():
                    cached[name] = output.num_cached_tokens
            forget(engine)
        assert cached == {"a1": 0, "a2": 1024, "b1": 0}


def test_a_prompt_that_waits_for_room_on_the_device_does_not_ask_the_stores_in_every_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kv_connector, "SETTLED_S", 3600.0)
    kv_cache = KvCacheConfig(host_bytes=HOST_BYTES, host_directory=str(tmp_path), staging_bytes=STAGING_BYTES)
    with engine_with(kv_cache) as engine:
        warm(engine)
        ask(engine, prompt_of(LENGTH, seed=45))
        forget(engine)
        (tier,) = engine.scheduler.connector.tiers
        has, asked, before = tier.has, [], sum(report(engine)["choices"].values())
        monkeypatch.setattr(tier, "has", lambda names: asked.append(len(names)) or has(names))
        give_back = engine.take_blocks()
        engine.add(prompt_of(LENGTH, seed=45), 1)
        deadline, prompts = time.monotonic() + SETTLE_S, engine.scheduler.connector._prompts
        while not any(prompt.settled for prompt in prompts.values()):
            engine.engine.step()
            assert time.monotonic() < deadline
        num_asked = len(asked)
        for _ in range(20):
            engine.engine.step()
        give_back()
        engine.finish()
        assert len(asked) == num_asked > 0 and not prompts
        assert sum(report(engine)["choices"].values()) == before + 1


def test_a_prompt_is_computed_where_the_store_is_slower_and_the_reason_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, alone: dict[int, Answer]
) -> None:
    kv_cache = KvCacheConfig(host_bytes=HOST_BYTES, host_directory=str(tmp_path), staging_bytes=STAGING_BYTES)
    with engine_with(kv_cache) as engine:
        warm(engine)
        ask(engine, prompt_of(LENGTH, seed=1))
        forget(engine)
        (tier,) = engine.scheduler.connector.tiers
        for _ in range(10):
            tier.cost.observe(tier.block_size_bytes, 5.0)
        answer = ask(engine, prompt_of(LENGTH, seed=1))
        assert same(answer, alone[1]) and answer.num_cached == 0
        assert report(engine)["choices"]["slower"] == 1
        # and it is tried again beside the computing, so that a store that is fast again is found out
        forget(engine)
        monkeypatch.setattr(kv_connector, "MEASURE_S", 0.0)
        for _ in range(12):
            ask(engine, prompt_of(LENGTH, seed=1))
            forget(engine)
            time.sleep(0.05)
        assert ask(engine, prompt_of(LENGTH, seed=1)).num_cached == 1024, report(engine)


@pytest.mark.parametrize("fault", ["killed", "stopped", "flushed", "damaged", "never there", "full", "wrong password"])
def test_a_bad_redis_costs_no_request_and_changes_no_answer(
    fault: str, redis: RedisServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, alone: dict[int, Answer]
) -> None:
    from redis import Redis

    url = nobody() if fault == "never there" else redis.url
    client = Redis.from_url(redis.url)
    if fault == "wrong password":
        client.config_set("requirepass", "right")
        monkeypatch.setenv("MOERAY_KV_REDIS_PASSWORD", "wrong")
    if fault == "full":
        client.config_set("maxmemory-policy", "noeviction")
        client.config_set("maxmemory", "2mb")
    kv_cache = KvCacheConfig(host_bytes=0, redis_url=url, staging_bytes=STAGING_BYTES)
    with engine_with(kv_cache) as engine:
        warm(engine)
        for seed in range(4):
            assert same(ask(engine, prompt_of(LENGTH, seed)), alone[seed])
        forget(engine)
        if fault == "killed":
            redis.kill()
        if fault == "stopped":
            assert redis.process is not None
            os.kill(redis.process.pid, signal.SIGSTOP)
        if fault == "flushed":
            client.flushall()
        if fault == "damaged":
            for key in client.scan_iter():
                client.setrange(key, 5000, bytes(reversed(client.getrange(key, 5000, 5100))))
        for seed in range(4):
            assert same(ask(engine, prompt_of(LENGTH, seed)), alone[seed])
        told = report(engine)["stores"]["redis"]
        if fault in ("killed", "stopped", "never there", "wrong password"):
            assert not told["in_use"] and "kv_cache.redis_url" in told["reason"] and "right" not in str(told)
        if fault == "damaged":
            assert told["missing_blocks"]
        assert redis.process is None or redis.process.poll() is None


def test_prompts_that_arrive_together_while_a_store_hangs_hold_up_one_step_and_leave_no_questions(
    redis: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    kv_cache = KvCacheConfig(host_bytes=0, redis_url=redis.url, staging_bytes=STAGING_BYTES, timeout_s=60.0)
    with engine_with(kv_cache) as engine:
        ask(engine, prompt_of(700, seed=1))
        settle(engine)
        assert redis.process is not None
        os.kill(redis.process.pid, signal.SIGSTOP)
        waits, wait = [], kv_connector.wait
        monkeypatch.setattr(kv_connector, "wait", lambda *told: waits.append(told[1]) or wait(*told))
        for seed in range(2, 10):
            engine.add(prompt_of(700, seed), 1)
        engine.engine.step()
        assert waits.count(kv_connector.AT_ONCE_S) == 1
        asked, *queued = engine.scheduler.connector._questions()
        (tier,) = engine.scheduler.connector.tiers
        num_answers, reason = len(engine.finish()), tier.breaker.reason
        os.kill(redis.process.pid, signal.SIGCONT)
        assert num_answers == 8 and "no answer within" in reason
        assert not asked.cancelled() and all(question.cancelled() for question in queued)


def test_a_redis_that_comes_back_is_used_again(redis: RedisServer, alone: dict[int, Answer]) -> None:
    kv_cache = KvCacheConfig(host_bytes=0, redis_url=redis.url, staging_bytes=STAGING_BYTES)
    with engine_with(kv_cache) as engine:
        warm(engine)
        redis.kill()
        for seed in range(4):
            ask(engine, prompt_of(LENGTH, seed))
            forget(engine)
        assert not report(engine)["stores"]["redis"]["in_use"]
        redis.start()
        deadline = time.monotonic() + SETTLE_S
        while (answer := ask(engine, prompt_of(LENGTH, 1))).num_cached != 1024:
            assert same(answer, alone[1]) and time.monotonic() < deadline
            forget(engine)
            time.sleep(0.5)
        assert same(answer, alone[1])
