"""Engram tables outside the engine: who has which rows, and how a shard gets them."""

from moeray.engram.mapped import FileRange, LocalTables, Table, prefault
from moeray.engram.patient_rows import PatientRows
from moeray.engram.rows import AskedRows, EngramRows, IntArray, RowsUnavailable, StoredRows
from moeray.engram.shares import Shares, shares_without
from moeray.engram.tables import RowFile, TableFiles, TableSet

__all__ = [
    "AskedRows",
    "EngramRows",
    "FileRange",
    "IntArray",
    "LocalTables",
    "PatientRows",
    "RowFile",
    "RowsUnavailable",
    "Shares",
    "StoredRows",
    "Table",
    "TableFiles",
    "TableSet",
    "prefault",
    "shares_without",
]
