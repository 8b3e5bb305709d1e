"""Clients of Redis as tenancy wants them: short waits, one retry on a new connection, the password in no URL."""

from __future__ import annotations

from typing import Any

from redis import Redis
from redis.asyncio import BlockingConnectionPool
from redis.asyncio import Redis as AsyncRedis
from redis.asyncio.retry import Retry as AsyncRetry
from redis.backoff import NoBackoff
from redis.retry import Retry


def connect(url: str, password: str | None, *, timeout_s: float) -> Redis:
    """For the command line and for threads. Reaches nothing yet."""
    return Redis.from_url(url, retry=Retry(NoBackoff(), 1), **_options(password, timeout_s))


def connect_async(url: str, password: str | None, *, timeout_s: float, max_connections: int = 64) -> AsyncRedis:
    """For one event loop. Reaches nothing yet. Calls beyond `max_connections` wait for one that is free."""
    pool = BlockingConnectionPool.from_url(
        url, retry=AsyncRetry(NoBackoff(), 1), max_connections=max_connections, timeout=timeout_s,
        **_options(password, timeout_s),
    )  # fmt: skip
    return AsyncRedis.from_pool(pool)


def _options(password: str | None, timeout_s: float) -> dict[str, Any]:
    return {
        "password": password, "socket_timeout": timeout_s, "socket_connect_timeout": timeout_s,
        "decode_responses": True,
    }  # fmt: skip
