"""Two ingresses with one Redis: a tenant's limit is one limit, to the request."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from front_process import Ingress, ShardProcess, chat, until
from redis_server import RedisServer, missing
from tenants import Tenants

CLIENTS, ASKED, LIMIT = 50, 150, 100


@pytest.fixture(scope="module")
def redis(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    if (why := missing()) is not None:
        pytest.skip(f"NOT tested against a Redis server: {why}")
    server = RedisServer(tmp_path_factory.mktemp("redis"))
    server.start()
    yield server
    server.kill()


@pytest.fixture(scope="module")
def tenants(redis: RedisServer, tmp_path_factory: pytest.TempPathFactory) -> Tenants:
    return Tenants(tmp_path_factory.mktemp("tenants"), {"redis": {"url": redis.url}, "ingress": {"num_replicas": 2}})


@pytest.fixture(scope="module")
def pair(model: Path, shared_shard: ShardProcess, tenants: Tenants) -> Iterator[list[Ingress]]:
    tenants.create("first")
    both = [Ingress(model, **tenants.settings) for _ in range(2)]
    for ingress in both:
        ingress.set_shards(shared_shard)
    yield both
    for ingress in both:
        ingress.stop()


def test_a_hundred_requests_a_minute_are_a_hundred_through_two_ingresses(pair: list[Ingress], tenants: Tenants) -> None:
    headers = tenants.create("busy", requests_per_minute=LIMIT)
    for ingress in pair:
        until(lambda ingress=ingress: ingress.get("/v1/models", headers)[0] == 200)

    def ask(number: int) -> int:
        body = chat(max_tokens=1, stream=bool(number % 3 == 0))
        return pair[number % 2].status(body, headers)

    with ThreadPoolExecutor(CLIENTS) as threads:
        answers = Counter(threads.map(ask, range(ASKED)))
    assert answers == {200: LIMIT, 429: ASKED - LIMIT}
    until(lambda: len(tenants.records("busy")) == LIMIT)


def test_without_redis_limited_tenants_are_refused_and_others_served(
    pair: list[Ingress], tenants: Tenants, redis: RedisServer
) -> None:
    limited, free = tenants.create("limited", requests_per_minute=1000), tenants.headers("first")
    until(lambda: pair[0].get("/v1/models", limited)[0] == 200)
    redis.kill()
    try:
        assert pair[0].status(chat(max_tokens=1), limited) == 503
        assert pair[0].status(chat(max_tokens=1), free) == 200
    finally:
        redis.start()
    until(lambda: pair[0].status(chat(max_tokens=1), limited) == 200)
