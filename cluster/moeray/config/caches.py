"""cluster.yaml's `kv_cache` and `engram`: what is shared between shards, and where it lies."""

from __future__ import annotations

from typing import Literal

from pydantic.dataclasses import dataclass

from moeray.config.fields import FROM_FILE, CountOrZero

EngramPlacement = Literal["host"]


@dataclass(frozen=True, config=FROM_FILE)
class KvCacheConfig:
    """KV blocks that outlive the engine's own cache.

    Attributes:
        host_bytes: of each node's memory (/dev/shm), shared by its shards; 0 keeps blocks in the engines alone.
    """

    host_bytes: CountOrZero = 0


@dataclass(frozen=True, config=FROM_FILE)
class EngramConfig:
    """Where the rows of Engram tables lie.

    Attributes:
        placement: host: the checkpoint's file, mapped by every shard of a node, one copy in its memory.
    """

    placement: EngramPlacement = "host"
