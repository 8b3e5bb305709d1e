"""What only a server has: it dies, hangs, forgets, fills up, refuses, and is something else. Real ones, on loopback."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from kv_stores import BLOCK_BYTES, NAMESPACE, block_of, blocks_of, loaded, names_of
from redis import Redis
from redis_server import LOOPBACK, RedisServer, missing, nobody, something_else

from moeray.kv_cache import BlockStore, RedisBlocks, StoreFailed
from moeray.kv_cache.redis_blocks import redis_password

SHORT_S = 0.3
WAIT_S = 60.0
LRU_CLOCK_S = 1.1
"""Redis counts time since the last use in seconds."""
NAMES = names_of(8)
WHOLE = [bytes(block) for block in blocks_of(NAMES)]


def opened(url: str, *, password: str | None = None, timeout_s: float = WAIT_S, ttl_s: float = 3600) -> RedisBlocks:
    return RedisBlocks(url, password, NAMESPACE, BLOCK_BYTES, ttl_s=ttl_s, timeout_s=timeout_s)


def calls_of(store: BlockStore) -> dict[str, Callable[[], object]]:
    """Each that asks the server."""
    return {
        "has": lambda: store.has(NAMES),
        "load": lambda: list(store.load(NAMES)),
        "store": lambda: store.store(NAMES, blocks_of(NAMES)),
        "touch": lambda: store.touch(NAMES),
        "usage": store.usage,
        "flush": store.flush,
    }


@contextmanager
def server(folder: Path, **options: str) -> Iterator[RedisServer]:
    if (why := missing()) is not None:
        pytest.skip(f"NOT tested against a Redis server: {why}")
    started = RedisServer(folder, **{"appendonly": "no", **options})
    started.start()
    try:
        yield started
    finally:
        started.kill()


def test_a_redis_that_was_killed_fails_every_call_and_is_used_again_when_it_is_back(tmp_path: Path) -> None:
    with server(tmp_path) as redis:
        store = opened(redis.url)
        assert store.store(NAMES, blocks_of(NAMES)) == 8
        redis.kill()
        for call in calls_of(store).values():
            with pytest.raises(StoreFailed, match=r"kv_cache\.redis_url: Redis at redis://127\.0\.0\.1:\d+/0: "):
                call()
        redis.start()  # and has lost everything
        assert loaded(store, NAMES) == [None] * 8
        assert store.store(NAMES, blocks_of(NAMES)) == 8
        assert loaded(store, NAMES) == WHOLE


def test_a_redis_that_hangs_fails_every_call_within_the_time_out_and_mixes_nothing_up_afterwards(
    tmp_path: Path,
) -> None:
    """An answer that comes after its call was given up must not be taken for that of the next."""
    with server(tmp_path) as redis:
        store, patient = opened(redis.url, timeout_s=SHORT_S), opened(redis.url)
        patient.store(NAMES, blocks_of(NAMES))
        assert redis.process is not None
        for call in calls_of(store).values():
            os.kill(redis.process.pid, signal.SIGSTOP)
            began = time.monotonic()
            with pytest.raises(StoreFailed, match=r"[Tt]ime"):
                call()
            assert SHORT_S <= time.monotonic() - began < 10 * SHORT_S
            os.kill(redis.process.pid, signal.SIGCONT)
            patient.store(NAMES, blocks_of(NAMES))
            assert loaded(patient, NAMES) == WHOLE
        store = opened(redis.url, timeout_s=WAIT_S)
        for shift in range(8):
            asked = NAMES[shift:] + NAMES[:shift]
            assert loaded(store, asked) == WHOLE[shift:] + WHOLE[:shift]


def test_a_redis_that_hangs_before_the_first_call_does_not_hang_its_client(tmp_path: Path) -> None:
    with server(tmp_path) as redis:
        assert redis.process is not None
        os.kill(redis.process.pid, signal.SIGSTOP)
        began = time.monotonic()
        with pytest.raises(StoreFailed):
            opened(redis.url, timeout_s=SHORT_S).has(NAMES)
        assert time.monotonic() - began < 10 * SHORT_S


def test_all_that_was_flushed_meanwhile_is_a_miss(redis: Redis, redis_server: RedisServer) -> None:
    store = opened(redis_server.url)
    store.store(NAMES, blocks_of(NAMES))
    assert all(store.has(NAMES))
    redis.flushall()
    assert loaded(store, NAMES) == [None] * 8
    store.touch(NAMES)
    assert redis.dbsize() == 0
    assert store.store(NAMES, blocks_of(NAMES)) == 8


@pytest.mark.parametrize("password", ["wrong-secret", None])
def test_a_wrong_password_is_said_without_saying_it(tmp_path: Path, password: str | None) -> None:
    with server(tmp_path) as redis:
        with Redis.from_url(redis.url) as client:
            client.config_set("requirepass", "right-secret")
        for call in calls_of(opened(redis.url, password=password)).values():
            with pytest.raises(StoreFailed, match=r"(?i)password|auth") as caught:
                call()
            assert "secret" not in str(caught.value)
        assert opened(redis.url, password="right-secret").store(NAMES, blocks_of(NAMES)) == 8


def test_the_tiers_own_password_goes_before_the_clusters(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MOERAY_KV_REDIS_PASSWORD", raising=False)
    monkeypatch.delenv("MOERAY_REDIS_PASSWORD", raising=False)
    assert redis_password() is None
    monkeypatch.setenv("MOERAY_REDIS_PASSWORD", "cluster's")
    assert redis_password() == "cluster's"
    monkeypatch.setenv("MOERAY_KV_REDIS_PASSWORD", "tier's")
    assert redis_password() == "tier's"


def test_a_full_redis_that_evicts_nothing_refuses_and_still_has_what_it_had(tmp_path: Path) -> None:
    with server(tmp_path, maxmemory="3mb", maxmemory_policy="noeviction") as redis:
        store, names = opened(redis.url), names_of(2000)
        with pytest.raises(StoreFailed, match="maxmemory"):
            store.store(names, blocks_of(names))
        kept = sum(store.has(names))
        assert kept >= 40
        found = loaded(store, names)
        assert sum(block is not None for block in found) == kept
        assert all(found[i] in (None, bytes(block_of(name))) for i, name in enumerate(names))
        assert store.usage().budget_bytes == 3 << 20
        store.flush()
        assert store.store(names[:20], blocks_of(names[:20])) == 20


def test_a_full_redis_that_evicts_keeps_what_was_used_last_and_its_budget(tmp_path: Path) -> None:
    with (
        server(tmp_path, maxmemory="8mb", maxmemory_policy="allkeys-lru", maxmemory_samples="64") as redis,
        Redis.from_url(redis.url) as client,
    ):
        store, names = opened(redis.url), names_of(3000)
        for first, last in ((0, 50), (50, 500)):
            store.store(names[first:last], blocks_of(names[first:last]))
            time.sleep(LRU_CLOCK_S)
        store.touch(names[:50])
        last = 500
        while sum(store.has(names[50:500])) > 200:
            assert store.store(names[last : last + 25], blocks_of(names[last : last + 25])) == 25
            last += 25
        assert all(store.has(names[:50])), "what was touched"
        assert sum(store.has(names[500:last])) >= 0.98 * (last - 500), "what came last"
        assert client.info("memory")["used_memory"] < 9 << 20
        found = loaded(store, names[:last])
        assert all(found[i] in (None, bytes(block_of(name))) for i, name in enumerate(names[:last]))


def test_what_is_not_used_for_its_time_goes(redis: Redis, redis_server: RedisServer) -> None:
    store = opened(redis_server.url, ttl_s=100)
    store.store(NAMES, blocks_of(NAMES))
    for key in redis.scan_iter():
        redis.expire(key, 5)
    store.touch(NAMES[:2])
    assert sorted(redis.ttl(key) > 5 for key in redis.scan_iter()) == [False] * 6 + [True] * 2


def test_a_replica_that_may_only_be_read_is_read(tmp_path: Path) -> None:
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    with server(tmp_path / "one") as redis, server(tmp_path / "two") as copy, Redis.from_url(copy.url) as client:
        opened(redis.url).store(NAMES[:6], blocks_of(NAMES[:6]))
        with Redis.from_url(redis.url) as origin:
            origin.setrange(f"moeray-kv:{NAMESPACE}:".encode() + NAMES[5], 3000, b"damage")
        client.replicaof(LOOPBACK, redis.url.rpartition(":")[2].partition("/")[0])
        deadline = time.monotonic() + WAIT_S
        while client.dbsize() < 6 or client.info("replication")["master_link_status"] != "up":
            assert time.monotonic() < deadline
            time.sleep(0.05)
        store = opened(copy.url)
        assert loaded(store, NAMES) == [*WHOLE[:5], None, None, None]
        with pytest.raises(StoreFailed, match=r"(?i)read.?only"):
            store.store(NAMES, blocks_of(NAMES))
        store.touch(NAMES)
        assert loaded(store, NAMES[:2]) == WHOLE[:2]


@pytest.mark.parametrize("answer", [b"", b"HTTP/1.1 400 Bad Request\r\n\r\n", b":7\r\n", b"$-7\r\n", b"\x00\xff" * 8])
def test_what_is_no_redis_is_an_error_of_ours_in_time(answer: bytes) -> None:
    with something_else(answer, 0.02) as url:
        for name, call in calls_of(opened(url, timeout_s=SHORT_S)).items():
            began = time.monotonic()
            try:
                found = call()
            except StoreFailed:
                assert time.monotonic() - began < WAIT_S / 2
            else:  # a number is an answer to some
                assert answer == b":7\r\n"
                assert name != "load" or found == [None] * len(NAMES)


def test_a_port_without_a_server_is_an_error_of_ours() -> None:
    for call in calls_of(opened(nobody(), timeout_s=SHORT_S)).values():
        with pytest.raises(StoreFailed):
            call()
