"""Where a model's Engram tables lie, and how a shard gets their rows from there."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

from moeray.deepseek_v4.checkpoint import Checkpoint
from moeray.deepseek_v4.engram import EngramLayout
from moeray.deepseek_v4.engram_table import EngramTable, table_name
from moeray.deepseek_v4.weight_files import StoredTensor
from moeray.engram import EngramRows, LocalTables, RowFile, Table, TableFiles, TableSet
from moeray.vllm_hooks.settings import ShardSettings

ROWS_PER_KEY = 8
"""Of a Redis: one by one, rows take half as much memory again; 64 together are eight times the bytes on the way."""


def engram_tables(checkpoint: Checkpoint, layout: EngramLayout) -> TableSet:
    """The rows of every Engram layer in the checkpoint's files, cut by hash column.

    Raises:
        CheckpointError: a table is missing, or is not one that a layer could gather from (see `EngramTable`).
    """
    tables = []
    for index, layer_id in enumerate(layout.layer_ids):
        stored = checkpoint.matrix(table_name(layer_id))
        EngramTable(stored, (layout.num_rows[index], layout.head_dim))  # for its checks
        starts = tuple(accumulate(layout.primes[index], initial=0))
        scales = None if stored.scale is None else _rows(stored.scale)
        tables.append(TableFiles(stored.weight.name, _rows(stored.weight), scales, starts))
    return TableSet(checkpoint.fingerprint(), tuple(tables))


def open_rows(
    settings: ShardSettings | None, checkpoint: Checkpoint, layout: EngramLayout, mapped: Sequence[Table]
) -> EngramRows:
    """The rows of every Engram layer, placed as the shard was told; without settings, where they are mapped.

    Raises:
        CheckpointError: see `engram_tables`.
    """
    if settings is None or settings.engram == "host":
        return LocalTables(mapped)
    if settings.engram == "device":
        return LocalTables([table.copied() for table in mapped])
    # These import redis and numba, which other placements do without.
    from moeray.engram.redis_pages import RedisPages
    from moeray.engram.redis_rows import RedisRows
    from moeray.kv_cache.redis_blocks import redis_password

    redis = settings.engram_redis
    pages = RedisPages(
        redis.redis_url, redis_password(), engram_tables(checkpoint, layout), rows_per_key=ROWS_PER_KEY,
        timeout_s=redis.redis_timeout_s, tls_ca_file=redis.redis_ca_file,
    )  # fmt: skip
    return RedisRows(pages, hot_bytes=redis.redis_hot_bytes, has_file=True)


def _rows(stored: StoredTensor) -> RowFile:
    return RowFile(stored.file, stored.offset, stored.num_bytes // stored.shape[0])
