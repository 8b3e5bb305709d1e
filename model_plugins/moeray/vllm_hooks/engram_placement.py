"""How a shard gets the rows of its Engram tables from where they lie."""

from __future__ import annotations

from collections.abc import Sequence

from moeray.deepseek_v4.checkpoint import Checkpoint
from moeray.deepseek_v4.engram import EngramLayout
from moeray.deepseek_v4.engram_files import engram_tables
from moeray.engram import EngramRows, LocalTables, PatientRows, Shares, Table
from moeray.vllm_hooks.settings import ShardSettings

ROWS_PER_KEY = 8
"""Of a Redis: one by one, rows take half as much memory again; 64 together are eight times the bytes on the way."""


def open_rows(
    settings: ShardSettings | None, checkpoint: Checkpoint, layout: EngramLayout, mapped: Sequence[Table]
) -> EngramRows:
    """The rows of every Engram layer, placed as the shard was told; without settings, where they are mapped.

    Raises:
        CheckpointError: see `engram_tables`.
    """
    if settings is None or settings.engram.placement == "host":
        return LocalTables(mapped)
    if settings.engram.placement == "device":
        return LocalTables([table.copied() for table in mapped])
    if settings.engram.placement == "sharded":
        return _served(settings, checkpoint, layout)
    # These import redis and numba, which other placements do without.
    from moeray.engram.redis_pages import RedisPages
    from moeray.engram.redis_rows import RedisRows
    from moeray.kv_cache.redis_blocks import redis_password

    redis = settings.engram
    pages = RedisPages(
        redis.redis_url, redis_password(), engram_tables(checkpoint, layout), rows_per_key=ROWS_PER_KEY,
        timeout_s=redis.redis_timeout_s, tls_ca_file=redis.redis_ca_file,
    )  # fmt: skip
    return RedisRows(pages, hot_bytes=redis.redis_hot_bytes, has_file=True)


def _served(settings: ShardSettings, checkpoint: Checkpoint, layout: EngramLayout) -> PatientRows:
    """Where the row servers are comes with the routes."""
    from moeray.engram.served_rows import ServedRows

    tables, engram = engram_tables(checkpoint, layout), settings.engram
    shares = Shares(engram.num_servers, engram.copies, tables.num_columns)
    served = ServedRows(
        tables, shares, {}, sender=settings.shard, timeout_s=engram.timeout_s, host=settings.host, tls=settings.tls
    )
    return PatientRows(served, settings.wait_s)
