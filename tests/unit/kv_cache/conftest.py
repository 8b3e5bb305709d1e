"""What the suites of block stores share: a Redis server, emptied for each test."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from redis import Redis
from redis_server import RedisServer, missing


@pytest.fixture(scope="session")
def redis_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    if (why := missing()) is not None:
        pytest.skip(f"NOT tested against a Redis server: {why}")
    server = RedisServer(tmp_path_factory.mktemp("redis"), appendonly="no")
    server.start()
    yield server
    server.kill()


@pytest.fixture
def redis(redis_server: RedisServer) -> Iterator[Redis]:
    with Redis.from_url(redis_server.url) as client:
        client.flushall()
        yield client
