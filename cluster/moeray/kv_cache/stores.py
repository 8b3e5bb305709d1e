"""The store of each kind that cluster.yaml describes."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from moeray.config import KvCacheConfig
from moeray.kv_cache.blocks import BlockStore
from moeray.kv_cache.node_blocks import NodeBlocks, default_directory
from moeray.kv_cache.redis_blocks import RedisBlocks, redis_password

StoreKind = Literal["node", "redis"]


def open_store(kind: StoreKind, config: KvCacheConfig, namespace: str, block_bytes: int) -> BlockStore:
    """The store of this node, or of all.

    Raises:
        StoreFailed: it cannot be used at all.
    """
    if kind == "node":
        directory = Path(config.host_directory) if config.host_directory else default_directory()
        return NodeBlocks(directory, namespace, block_bytes, config.host_bytes)
    return RedisBlocks(
        config.redis_url,
        redis_password(),
        namespace,
        block_bytes,
        ttl_s=config.redis_ttl_s,
        timeout_s=config.timeout_s,
        tls_ca_file=config.redis_ca_file,
    )
