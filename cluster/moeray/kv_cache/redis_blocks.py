"""Blocks in a Redis that all nodes share.

That Redis must be one of its own, bounded (`maxmemory`) and with `maxmemory-policy allkeys-lru`: it drops what was used
longest ago. One that keeps quotas or cluster state must never drop anything.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterator, Sequence
from typing import Any
from urllib.parse import urlsplit, urlunsplit

from redis import Redis, RedisCluster, RedisError, ResponseError, Sentinel
from redis.backoff import NoBackoff
from redis.retry import Retry

from moeray.kv_cache.blocks import StoreFailed, Usage
from moeray.kv_cache.frame import HEADER_BYTES, header, unframed

PREFIX = "moeray-kv"
BATCH_BYTES = 4 << 20
"""Of one round trip."""
BATCH_KEYS = 4096
PASSWORDS = ("MOERAY_KV_REDIS_PASSWORD", "MOERAY_REDIS_PASSWORD")
TLS, SENTINEL, CLUSTER = "rediss", "redis+sentinel", "redis+cluster"

ANSWERED_WRONGLY = (RedisError, OSError, ValueError, TypeError, AttributeError, LookupError)
"""What the client raises: the last three where what answers is no Redis, which it does not expect."""


def redis_password() -> str | None:
    """From the environment: the tier's own, else that of the cluster's Redis."""
    return next((os.environ[name] for name in PASSWORDS if os.environ.get(name)), None)


class RedisBlocks:
    """See module docstring; implements `BlockStore`. Connects when it is first used.

    Args:
        url: redis://host:port/database, rediss:// with TLS, redis+sentinel://host:port,host:port/service/database or
            redis+cluster://host:port; without a password.
        ttl_s: a block that is not used for so long is dropped.
        timeout_s: a call is given up when Redis says nothing for so long.
        tls_ca_file: PEM of the authority of rediss://; empty: the system's.
    """

    name = "redis"

    def __init__(
        self,
        url: str,
        password: str | None,
        namespace: str,
        block_bytes: int,
        *,
        ttl_s: float,
        timeout_s: float,
        tls_ca_file: str = "",
    ) -> None:
        self.where, self.namespace = url, namespace
        self._prefix = f"{PREFIX}:{namespace}:".encode()
        self._block_bytes, self._ttl_s = block_bytes, max(1, int(ttl_s))
        self._batch = max(1, BATCH_BYTES // block_bytes)
        self._options: dict[str, Any] = {
            "password": password, "socket_timeout": timeout_s, "socket_connect_timeout": timeout_s,
            "retry": Retry(NoBackoff(), 0),
        }  # fmt: skip
        if tls_ca_file and urlsplit(url).scheme == TLS:
            self._options["ssl_ca_certs"] = tls_ca_file
        self._client: Any = None
        self._connecting = threading.Lock()

    def has(self, names: Sequence[bytes]) -> list[bool]:
        found: list[bool] = []
        for first in range(0, len(names), BATCH_KEYS):
            keys = [self._prefix + name for name in names[first : first + BATCH_KEYS]]
            found += [bool(self._good(each)) for each in self._all([("EXISTS", key) for key in keys])]
        return found

    def load(self, names: Sequence[bytes]) -> Iterator[memoryview | None]:
        for first in range(0, len(names), self._batch):
            part = names[first : first + self._batch]
            damaged = []
            for name, value in zip(part, self._all([("GET", self._prefix + name) for name in part]), strict=True):
                is_foreign = isinstance(value, ResponseError) and str(value).startswith("WRONGTYPE")
                stored = None if is_foreign else self._good(value)
                block = unframed(stored, name, self._block_bytes) if isinstance(stored, bytes) else None
                if is_foreign or (stored is not None and block is None):
                    damaged.append(self._prefix + name)
                yield block
            if damaged:
                self._all([("UNLINK", key) for key in damaged])

    def store(self, names: Sequence[bytes], blocks: Sequence[memoryview]) -> int:
        kept = 0
        for first in range(0, len(names), self._batch):
            part = slice(first, first + self._batch)
            sets = [
                ("SET", self._prefix + name, b"".join((header(name, block), block)), "EX", self._ttl_s, "NX")
                for name, block in zip(names[part], blocks[part], strict=True)
            ]
            kept += sum(bool(self._good(each)) for each in self._all(sets))
        return kept

    def touch(self, names: Sequence[bytes]) -> None:
        for first in range(0, len(names), BATCH_KEYS):
            keys = [self._prefix + name for name in names[first : first + BATCH_KEYS]]
            self._all([("EXPIRE", key, self._ttl_s) for key in keys])

    def usage(self) -> Usage:
        with self._saying():
            client = self._connected()
            blocks = sum(1 for _ in client.scan_iter(match=self._prefix + b"*", count=BATCH_KEYS))
            if isinstance(client, RedisCluster):  # node -> its own
                memories = list(client.info("memory", target_nodes=RedisCluster.PRIMARIES).values())
            else:
                memories = [client.info("memory")]
            budget = sum(int(memory["maxmemory"]) for memory in memories)
        return Usage(blocks, blocks * (HEADER_BYTES + self._block_bytes), budget)

    def flush(self) -> int:
        count = 0
        with self._saying():
            keys = list(self._connected().scan_iter(match=self._prefix + b"*", count=BATCH_KEYS))
        for first in range(0, len(keys), BATCH_KEYS):
            unlinked = self._all([("UNLINK", key) for key in keys[first : first + BATCH_KEYS]])
            count += sum(int(self._good(each)) for each in unlinked)
        return count

    def close(self) -> None:
        with self._connecting:
            if self._client is not None:
                self._client.close()

    def _all(self, commands: Sequence[tuple[Any, ...]]) -> list[Any]:
        """Answers in order, errors of single commands among them; one round trip."""
        with self._saying():
            pipeline = self._connected().pipeline(transaction=False)
            for command in commands:
                pipeline.execute_command(*command)
            answers: list[Any] = pipeline.execute(raise_on_error=False)
        return answers

    def _good(self, answer: Any) -> Any:
        if isinstance(answer, Exception):
            raise StoreFailed(self._say(answer)) from answer
        return answer

    @contextlib.contextmanager
    def _saying(self) -> Iterator[None]:
        try:
            yield
        except ANSWERED_WRONGLY as error:
            raise StoreFailed(self._say(error)) from error

    def _say(self, error: Exception) -> str:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        return f"kv_cache.redis_url: Redis at {self.where}: {reason}"

    def _connected(self) -> Any:
        with self._connecting:
            if self._client is None:
                self._client = self._connect()
            return self._client

    def _connect(self) -> Any:
        parts = urlsplit(self.where)
        if parts.scheme == CLUSTER:
            return RedisCluster.from_url(urlunsplit(("redis", *parts[1:])), **self._options)
        if parts.scheme == SENTINEL:
            service, _, database = parts.path.strip("/").partition("/")
            hosts = [host.rpartition(":") for host in parts.netloc.split(",")]
            options = {key: value for key, value in self._options.items() if key != "password"}
            sentinel: Any = Sentinel(  # type: ignore[no-untyped-call, unused-ignore]
                [(host, int(port)) for host, _, port in hosts], sentinel_kwargs=options, **self._options
            )
            return sentinel.master_for(service, db=int(database or 0))
        return Redis.from_url(self.where, **self._options)
