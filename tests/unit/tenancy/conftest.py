"""What tenancy's suites share: a Redis server, emptied for each test."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from redis import Redis
from redis_server import RedisServer, missing

from moeray.tenancy import connect

TIMEOUT_S = 60.0


@pytest.fixture(scope="session")
def redis_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    if (why := missing()) is not None:
        pytest.skip(f"NOT tested against a Redis server: {why}")
    server = RedisServer(tmp_path_factory.mktemp("redis"))
    server.start()
    yield server
    server.kill()


@pytest.fixture
def redis(redis_server: RedisServer) -> Iterator[Redis]:
    client = connect(redis_server.url, None, timeout_s=TIMEOUT_S)
    client.flushall()
    yield client
    client.close()
