"""Where the controller's state outlives it: Redis if the configuration names one, else Ray's own store."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from redis import Redis

TIMEOUT_S = 5.0
TTL_S = 7 * 24 * 3600
"""A state that nobody wrote for so long is of a cluster that is gone."""
PASSWORD_VARIABLE = "MOERAY_REDIS_PASSWORD"  # noqa: S105 the name, not the password


class StoreError(RuntimeError):
    """The store does not answer, or refuses."""


class Store(Protocol):
    """One text. Calls block, for TIMEOUT_S at the most; every one may raise StoreError."""

    def load(self) -> str | None: ...

    def save(self, text: str) -> None: ...

    def delete(self) -> None: ...


def open_store(redis_url: str, cluster: str) -> Store:
    """The store of the cluster with this id. Reaches nothing yet."""
    key = f"moeray:controller:{cluster}"
    return RedisStore(redis_url, key) if redis_url else RayStore(key)


class RedisStore:
    """A key in Redis."""

    def __init__(self, url: str, key: str) -> None:
        from redis import Redis
        from redis.backoff import NoBackoff
        from redis.retry import Retry

        self._key = key
        self._redis: Redis = Redis.from_url(
            url, password=os.environ.get(PASSWORD_VARIABLE), socket_timeout=TIMEOUT_S,
            socket_connect_timeout=TIMEOUT_S, retry=Retry(NoBackoff(), 1), decode_responses=True,
        )  # fmt: skip

    def load(self) -> str | None:
        from redis import RedisError

        try:
            text = self._redis.get(self._key)
        except (RedisError, OSError) as error:
            raise StoreError(f"redis: {error}") from error
        return None if text is None else str(text)

    def save(self, text: str) -> None:
        from redis import RedisError

        try:
            self._redis.set(self._key, text, ex=TTL_S)
        except (RedisError, OSError) as error:
            raise StoreError(f"redis: {error}") from error

    def delete(self) -> None:
        from redis import RedisError

        try:
            self._redis.delete(self._key)
        except (RedisError, OSError) as error:
            raise StoreError(f"redis: {error}") from error


class RayStore:
    """A key in the Ray cluster's own store; it lives as long as the head node's (which Ray can keep in Redis)."""

    def __init__(self, key: str) -> None:
        self._key = key.encode()

    def load(self) -> str | None:
        from ray.experimental.internal_kv import _internal_kv_get

        try:
            text = _internal_kv_get(self._key)
        except Exception as error:
            raise StoreError(f"Ray's store: {error}") from error
        return None if text is None else text.decode()

    def save(self, text: str) -> None:
        from ray.experimental.internal_kv import _internal_kv_put

        try:
            _internal_kv_put(self._key, text.encode(), overwrite=True)
        except Exception as error:
            raise StoreError(f"Ray's store: {error}") from error

    def delete(self) -> None:
        from ray.experimental.internal_kv import _internal_kv_del

        try:
            _internal_kv_del(self._key)
        except Exception as error:
            raise StoreError(f"Ray's store: {error}") from error
