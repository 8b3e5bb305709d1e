"""KV blocks that several engines share: where they are kept, what of a prompt is there, and whether to fetch it."""

from moeray.kv_cache.blocks import BlockStore, StoreFailed, Usage
from moeray.kv_cache.breaker import Breaker
from moeray.kv_cache.choice import Choice, Option, choose
from moeray.kv_cache.cost import PrefillCost, TransferCost
from moeray.kv_cache.node_blocks import NodeBlocks
from moeray.kv_cache.prefixes import GroupKeys, Prefixes, probe
from moeray.kv_cache.redis_blocks import RedisBlocks
from moeray.kv_cache.stores import StoreKind, open_store

__all__ = [
    "BlockStore",
    "Breaker",
    "Choice",
    "GroupKeys",
    "NodeBlocks",
    "Option",
    "PrefillCost",
    "Prefixes",
    "RedisBlocks",
    "StoreFailed",
    "StoreKind",
    "TransferCost",
    "Usage",
    "choose",
    "open_store",
    "probe",
]
