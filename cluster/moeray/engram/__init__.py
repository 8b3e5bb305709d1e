"""Engram tables outside the engine: who has which rows, and how a shard gets them."""

from moeray.engram.mapped import FileRange, LocalTables, Table, prefault
from moeray.engram.rows import AskedRows, EngramRows, IntArray, RowsUnavailable, StoredRows

__all__ = [
    "AskedRows",
    "EngramRows",
    "FileRange",
    "IntArray",
    "LocalTables",
    "RowsUnavailable",
    "StoredRows",
    "Table",
    "prefault",
]
