"""cluster.yaml's `kv_cache` and `engram`: what is shared between shards, and where it lies."""

from __future__ import annotations

from typing import Annotated, Literal, Self
from urllib.parse import urlsplit

from pydantic import Field, model_validator
from pydantic.dataclasses import dataclass

from moeray.config.fields import FROM_FILE, Count, CountOrZero, Labels, Share

EngramPlacement = Literal["host", "device", "sharded", "redis"]
KV_REDIS_SCHEMES = ("redis", "rediss", "redis+sentinel", "redis+cluster")
ENGRAM_REDIS_SCHEMES = ("redis", "rediss")


@dataclass(frozen=True, config=FROM_FILE)
class KvCacheConfig:
    """KV blocks that outlive the engine's own cache: in its node's memory, in a Redis of all nodes.

    Attributes:
        host_bytes: of each node's memory, shared by its shards; 0 keeps no blocks there.
        host_directory: where they are, on a file system in memory; without it, /dev/shm/moeray-kv-<user id>. All
            clusters of one user on a node share it and its budget.
        staging_bytes: of each shard's own host memory, through which every block passes.
        redis_url: redis://host:port/database, rediss:// (TLS), redis+sentinel://host:port,host:port/service/database or
            redis+cluster://host:port, without a password (MOERAY_KV_REDIS_PASSWORD, else MOERAY_REDIS_PASSWORD); empty:
            none. Not `redis.url`: this one must be bounded and drop what is old (allkeys-lru), that one must keep all.
        redis_ca_file: PEM of the authority of rediss://; empty: the system's.
        redis_ttl_s: a block that is not used for so long is dropped.
        timeout_s: Redis is given up when it says nothing for so long, and left alone when that repeats.
    """

    host_bytes: CountOrZero = 256 << 20
    host_directory: str = ""
    staging_bytes: Count = 64 << 20
    redis_url: str = ""
    redis_ca_file: str = ""
    redis_ttl_s: Annotated[float, Field(ge=1, allow_inf_nan=False)] = 86_400.0
    timeout_s: Annotated[float, Field(gt=0, le=60, allow_inf_nan=False)] = 0.25

    @property
    def is_on(self) -> bool:
        """Whether there is anything behind the engines' own caches."""
        return bool(self.host_bytes or self.redis_url)

    @model_validator(mode="after")
    def _check_url(self) -> Self:
        if not self.redis_url:
            return self
        parts = urlsplit(self.redis_url)
        if parts.scheme not in KV_REDIS_SCHEMES or not parts.netloc:
            raise ValueError(f"kv_cache.redis_url: write one of {', '.join(KV_REDIS_SCHEMES)}, then ://host:port")
        if "@" in parts.netloc:
            raise ValueError(
                "kv_cache.redis_url: no user or password in a URL that is logged: set MOERAY_KV_REDIS_PASSWORD"
            )
        if parts.query or parts.fragment:
            raise ValueError("kv_cache.redis_url: no options behind ? or #: they could hold a password or a time-out")
        if self.redis_ca_file and parts.scheme != "rediss":
            raise ValueError(f"kv_cache.redis_ca_file is for rediss://, kv_cache.redis_url is {parts.scheme}://")
        return self


@dataclass(frozen=True, config=FROM_FILE)
class EngramConfig:
    """Where the rows of Engram tables lie.

    Attributes:
        placement: host: the checkpoint's files, mapped by every shard of a node, one copy in its memory; device: a copy
            in each shard's own memory, for small tables; sharded: row servers, each with its share of every table's
            hash columns, for tables that no single node holds; redis: pages of rows in a Redis, behind a cache of hot
            rows in each shard; what Redis does not bring in time, or not as it was stored, is read from the
            checkpoint's files and put there.
        prefault: bring mapped tables into memory before a shard (or row server) serves, so that no request waits for
            the disk.
        num_servers: row servers of `sharded`; each reads its share of the checkpoint's files.
        copies: servers that hold the same columns: so many less one can be lost and no request waits.
        timeout_s: a server that has not brought its rows by then is lost; with copies, each has its part of this time.
            Rows that nobody has are waited for, as experts are (experts.wait_s).
        max_servers_per_node: 0 is no limit; 1 puts copies on different nodes, and needs a node for each server.
        num_cpus: what each server asks of its Ray node.
        label_selector: as in AttentionConfig, `pool=engram`.
        redis_url: redis://host:port/database, or rediss:// (TLS), without a password (MOERAY_KV_REDIS_PASSWORD, else
            MOERAY_REDIS_PASSWORD). It takes as much memory as the tables, and may drop what it likes.
        redis_ca_file: PEM of the authority of rediss://; empty: the system's.
        redis_hot_bytes: of each shard's memory for its hot rows.
        redis_timeout_s: Redis is given up when it says nothing for so long, and left alone when that repeats.
    """

    placement: EngramPlacement = "host"
    prefault: Annotated[bool, Field(strict=True)] = True
    num_servers: CountOrZero = 0
    copies: Count = 1
    timeout_s: Annotated[float, Field(gt=0, le=60, allow_inf_nan=False)] = 1.0
    max_servers_per_node: Annotated[int, Field(strict=True, ge=0, le=100)] = 0
    num_cpus: Share = 0.1
    label_selector: Labels | None = None
    redis_url: str = ""
    redis_ca_file: str = ""
    redis_hot_bytes: Count = 256 << 20
    redis_timeout_s: Annotated[float, Field(gt=0, le=60, allow_inf_nan=False)] = 0.25

    @model_validator(mode="after")
    def _check_servers(self) -> Self:
        if (self.placement == "sharded") is not bool(self.num_servers):
            raise ValueError(
                f"engram.placement is {self.placement}, engram.num_servers is {self.num_servers}: "
                "`sharded` needs row servers, and no other placement has any"
            )
        if self.copies > max(1, self.num_servers):
            raise ValueError(
                f"engram.copies: {self.copies} copies need as many row servers, but engram.num_servers is "
                f"{self.num_servers}"
            )
        return self

    @model_validator(mode="after")
    def _check_redis(self) -> Self:
        if (self.placement == "redis") is not bool(self.redis_url):
            raise ValueError(
                f"engram.placement is {self.placement}, engram.redis_url is {self.redis_url or 'empty'}: "
                "`redis` needs a URL, and no other placement takes one"
            )
        if not self.redis_url:
            return self
        parts = urlsplit(self.redis_url)
        if parts.scheme not in ENGRAM_REDIS_SCHEMES or not parts.netloc:
            raise ValueError(f"engram.redis_url: write one of {', '.join(ENGRAM_REDIS_SCHEMES)}, then ://host:port")
        if "@" in parts.netloc:
            raise ValueError("engram.redis_url: no user or password in a URL that is logged: set MOERAY_REDIS_PASSWORD")
        return self
