"""Engram tables outside the engine: who has which rows, and how a shard gets them."""

from moeray.engram.rows import AskedRows, EngramRows, RowsUnavailable, StoredRows

__all__ = ["AskedRows", "EngramRows", "RowsUnavailable", "StoredRows"]
