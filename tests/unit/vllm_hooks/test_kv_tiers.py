"""A store as vLLM's tier: what is reported when, and what a store that is slow, dead or back does to it meanwhile."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import TypeVar

import numpy as np
import pytest
from kv_stores import block_of, names_of
from redis_server import RedisServer, missing
from vllm.v1.kv_offload.base import LookupResult, ReqContext
from vllm.v1.kv_offload.config import OffloadingGroupConfig, OffloadingModelConfig, OffloadingParallelConfig
from vllm.v1.kv_offload.tiering.base import JobResult, TransferJob

from moeray.config import KvCacheConfig
from moeray.kv_cache.breaker import FAILURES, FIRST_REST_S
from moeray.vllm_hooks.kv_jobs import Plan
from moeray.vllm_hooks.kv_tiers import RedisTier

BLOCK_BYTES, NUM_ROWS = 4096, 64
NAMES = names_of(24)
WAIT_S = 60.0
SOON_S = 0.2
Found = TypeVar("Found")


class Bench:
    """One tier, its region, and the scheduler's side of its jobs."""

    def __init__(self, redis: RedisServer, timeout_s: float) -> None:
        parallel = OffloadingParallelConfig(
            rank=0, world_size=1, tp_size=1, pp_size=1, pcp_size=1, dcp_size=1, data_parallel_index=0,
            data_parallel_size=1, data_parallel_rank_local=None, is_parallelism_agnostic=False,
        )  # fmt: skip
        config = SimpleNamespace(
            groups=(OffloadingGroupConfig(tokens_per_block=16, layer_names=("a",), group_id=0),),
            model=OffloadingModelConfig(name="m", dtype="bfloat16"), kv_cache_layout=None, parallel=parallel,
        )  # fmt: skip
        self.redis = redis
        self.region = np.zeros((NUM_ROWS, BLOCK_BYTES), np.uint8)
        kv_cache = asdict(KvCacheConfig(host_bytes=0, redis_url=redis.url, timeout_s=timeout_s))
        self.tier = RedisTier(SimpleNamespace(config=config), memoryview(self.region), "RedisTier", kv_cache, {})  # type: ignore[arg-type]
        self._num_jobs = 0

    def job(self, names: list[bytes], rows: list[int], patience_s: float = WAIT_S) -> TransferJob:
        self._num_jobs += 1
        context = ReqContext(f"r{self._num_jobs}")
        context.set_state(Plan({"redis": set(names)}, time.monotonic() + patience_s))
        return TransferJob(self._num_jobs, names, np.array(rows), is_promotion=True, req_context=context)  # type: ignore[arg-type]

    def store(self, names: list[bytes]) -> JobResult:
        self.region[: len(names)] = [np.frombuffer(block_of(name, BLOCK_BYTES), np.uint8) for name in names]
        self.tier.submit_store(self.job(names, list(range(len(names)))))
        return self.finished()

    def finished(self) -> JobResult:
        (result,) = eventually(lambda: list(self.tier.get_finished_jobs()))
        return result

    def signal(self, number: signal.Signals) -> None:
        assert self.redis.process is not None
        os.kill(self.redis.process.pid, number)


def eventually(look: Callable[[], Found]) -> Found:
    deadline = time.monotonic() + WAIT_S
    while not (found := look()):
        assert time.monotonic() < deadline
        time.sleep(0.005)
    return found


@pytest.fixture
def bench(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Bench]:
    if (why := missing()) is not None:
        pytest.skip(f"NOT tested against a Redis server: {why}")
    server = RedisServer(tmp_path, appendonly="no")
    server.start()
    bench = Bench(server, timeout_s=getattr(request, "param", WAIT_S))
    yield bench
    server.kill()
    bench.tier.shutdown()


def rows_of(names: list[bytes]) -> np.ndarray:
    return np.stack([np.frombuffer(block_of(name, BLOCK_BYTES), np.uint8) for name in names])


def test_rows_that_were_stored_come_back_into_other_rows_and_what_is_missing_is_named(bench: Bench) -> None:
    assert bench.store(NAMES[:20]).success
    job = bench.job(NAMES, list(range(63, 39, -1)))
    assert bench.tier.lookup(NAMES[0], job.req_context) is LookupResult.HIT
    bench.tier.submit_load(job)
    result = bench.finished()
    assert not result.success and set(result.successful_keys or ()) == set(NAMES[:20])
    assert (bench.region[63:43:-1] == rows_of(NAMES[:20])).all()
    assert bench.tier.lookup(NAMES[0], job.req_context) is LookupResult.HIT
    assert bench.tier.lookup(NAMES[23], job.req_context) is LookupResult.MISS, "it would be fetched again and again"
    assert not bench.tier.has_pending_work()


def test_what_a_fetch_cost_is_of_what_came(bench: Bench) -> None:
    bench.tier.submit_load(bench.job(NAMES, list(range(24))))
    bench.finished()
    assert bench.tier.cost.num_observed == 0


def test_a_fetch_past_its_deadline_is_reported_learned_from_and_writes_nothing_any_more(bench: Bench) -> None:
    assert bench.store(NAMES).success
    bench.region[:] = 7
    bench.signal(signal.SIGSTOP)
    bench.tier.submit_load(bench.job(NAMES, list(range(24)), SOON_S))
    result = bench.finished()
    assert not result.success and not result.successful_keys and bench.tier.counts.given_up == 1
    assert not bench.tier.has_pending_work()
    time.sleep(SOON_S)
    bench.signal(signal.SIGCONT)
    eventually(lambda: bench.tier.cost.num_observed)
    assert (bench.region == 7).all()
    assert (bench.tier.cost.predict(24 * BLOCK_BYTES) or 0.0) >= 2 * SOON_S


def test_a_fetch_that_was_given_up_while_it_waited_is_never_done(bench: Bench) -> None:
    assert bench.store(NAMES).success
    bench.signal(signal.SIGSTOP)
    bench.tier.submit_load(bench.job(NAMES[:1], [0]))
    bench.tier.submit_load(bench.job(NAMES[1:], list(range(1, 24)), SOON_S))
    waiting = bench.tier.jobs[-1]
    assert bench.finished().job_id == 3
    assert waiting.cancelled()
    bench.signal(signal.SIGCONT)
    assert bench.finished().success


def test_a_store_that_began_is_reported_when_its_rows_are_no_longer_read_and_not_before(bench: Bench) -> None:
    bench.signal(signal.SIGSTOP)
    bench.tier.submit_store(bench.job(NAMES, list(range(24)), SOON_S))
    time.sleep(3 * SOON_S)
    assert list(bench.tier.get_finished_jobs()) == [] and bench.tier.has_pending_work()
    bench.signal(signal.SIGCONT)
    assert bench.finished().success


def test_stores_that_wait_never_hold_more_than_their_share_of_the_region(bench: Bench) -> None:
    bench.signal(signal.SIGSTOP)
    for first in range(0, 64, 8):
        bench.tier.submit_store(bench.job(NAMES[:8], list(range(first, first + 8))))
    dropped = list(bench.tier.get_finished_jobs())
    assert [result.success for result in dropped] == [False] * 4
    assert bench.tier.counts.dropped_blocks == 32
    bench.signal(signal.SIGCONT)
    bench.tier.drain_jobs()
    assert [result.success for result in bench.tier.get_finished_jobs()] == [True] * 4


def test_a_step_with_more_blocks_than_that_share_is_kept_where_nothing_else_waits(bench: Bench) -> None:
    many = names_of(NUM_ROWS - 1)
    assert bench.store(many).success
    assert bench.tier.has(many) == [True] * len(many)


@pytest.mark.parametrize("bench", [0.5], indirect=True)
def test_a_store_that_succeeds_brings_back_a_redis_that_was_left_alone(bench: Bench) -> None:
    """An engine that only stores must not use up the tries and never say how they went."""
    bench.redis.kill()
    for _ in range(FAILURES):
        assert not bench.store(NAMES).success
    assert not bench.tier.breaker.is_closed and "kv_cache.redis_url" in bench.tier.breaker.reason
    assert bench.tier.has(NAMES) == [False] * 24
    bench.redis.start()
    time.sleep(FIRST_REST_S)
    eventually(lambda: bench.store(NAMES).success)
    assert bench.tier.breaker.is_closed
    assert bench.tier.has(NAMES) == [True] * 24


@pytest.mark.parametrize("bench", [0.5], indirect=True)
def test_a_redis_that_dies_ends_the_fetch_with_what_came_and_is_left_alone(bench: Bench) -> None:
    assert bench.store(NAMES).success
    bench.redis.kill()
    for _ in range(FAILURES):
        bench.tier.submit_load(bench.job(NAMES, list(range(24))))
        assert not bench.finished().success
    assert not bench.tier.breaker.is_closed and bench.tier.counts.failures >= FAILURES
    assert bench.tier.counts.missing_blocks == 24 * FAILURES


@pytest.mark.parametrize("bench", [1.0], indirect=True)
def test_a_redis_that_says_what_it_has_and_never_sends_it_is_left_alone(bench: Bench) -> None:
    """As where small packets pass and large ones do not."""
    assert bench.store(NAMES).success
    for _ in range(FAILURES):
        bench.signal(signal.SIGCONT)
        assert bench.tier.has(NAMES) == [True] * 24
        bench.signal(signal.SIGSTOP)
        bench.tier.submit_load(bench.job(NAMES, list(range(24))))
        assert not bench.finished().success
    bench.signal(signal.SIGCONT)
    assert not bench.tier.breaker.is_closed
