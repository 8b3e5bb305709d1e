"""The rows that one row server holds: maps of its columns, and the bytes of the rows that are asked for."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from moeray.engram.mapped import FileRange
from moeray.engram.row_wire import WireError
from moeray.engram.rows import Bytes, IntArray
from moeray.engram.shares import Shares
from moeray.engram.tables import RowFile, TableFiles, TableSet

BLOCK_BYTES = 1 << 20
"""Gathered and sent at once, so that an answer of any size needs no more memory."""


@dataclass(frozen=True, slots=True)
class _Span:
    """Rows [first, stop) of one table's values or scales."""

    first: int
    stop: int
    rows: Bytes


class HeldRows:
    """Maps of a server's share of every table. Thread-safe: nothing in it changes.

    Raises:
        OSError, ValueError: a file cannot be mapped.
    """

    def __init__(self, tables: TableSet, shares: Shares, server: int) -> None:
        self.tables, self.shares, self.server = tables, shares, server
        self._values = [self._spans(table, table.values) for table in tables.tables]
        self._scales = [[] if table.scales is None else self._spans(table, table.scales) for table in tables.tables]

    def _spans(self, table: TableFiles, part: RowFile) -> list[_Span]:
        rows = [self._rows_of(table, share) for share in self.shares.held_by(self.server)]
        return [_Span(first, stop, part.mapped(first, stop)) for first, stop in rows]

    def _rows_of(self, table: TableFiles, share: int) -> tuple[int, int]:
        columns = self.shares.columns(share)
        return table.column_starts[columns.start], table.column_starts[columns.stop]

    @property
    def num_bytes(self) -> int:
        """Of address space; in memory are those pages that were read."""
        return sum(span.rows.nbytes for part in (*self._values, *self._scales) for span in part)

    def ranges(self) -> list[FileRange]:
        """What is held, for `moeray.engram.prefault`."""
        return [
            part.range(*self._rows_of(table, share))
            for table in self.tables.tables
            for part in (table.values, table.scales)
            if part is not None
            for share in self.shares.held_by(self.server)
        ]

    def answer_bytes(self, rows_by_layer: list[IntArray]) -> int:
        """Bytes that `blocks` gives for this."""
        pairs = zip(rows_by_layer, self.tables.tables, strict=True)
        return sum(len(rows) * table.row_bytes for rows, table in pairs)

    def check(self, rows_by_layer: list[IntArray]) -> None:
        """Raises WireError: rows are not ascending, or one is not held here."""
        for rows, spans, table in zip(rows_by_layer, self._values, self.tables.tables, strict=True):
            if len(rows) > 1 and not bool(np.all(rows[1:] > rows[:-1])):
                raise WireError(f"rows of {table.name} that do not ascend")
            held = sum(stop - begin for _, begin, stop in _cuts(rows, spans))
            if held != len(rows):
                raise WireError(f"{len(rows) - held} rows of {table.name} are not held by row server {self.server}")

    def blocks(self, rows_by_layer: list[IntArray]) -> Iterator[Bytes]:
        """The rows' bytes as the wire has them, in blocks; each is good until the next. `check` first."""
        room = np.empty(BLOCK_BYTES, dtype=np.uint8)
        for layer, rows in enumerate(rows_by_layer):
            for spans in (self._values[layer], self._scales[layer]):
                for span, begin, stop in _cuts(rows, spans):
                    yield from _gathered(span.rows, rows[begin:stop] - span.first, room)


def _cuts(rows: IntArray, spans: list[_Span]) -> Iterator[tuple[_Span, int, int]]:
    """Which part of the ascending rows lies in each span."""
    for span in spans:
        begin, stop = np.searchsorted(rows, (span.first, span.stop))
        if begin < stop:
            yield span, int(begin), int(stop)


def _gathered(source: Bytes, rows: IntArray, room: Bytes) -> Iterator[Bytes]:
    row_bytes = source.shape[1]
    if row_bytes > room.nbytes:
        room = np.empty(row_bytes, dtype=np.uint8)
    at_once = room.nbytes // row_bytes
    for begin in range(0, len(rows), at_once):
        part = rows[begin : begin + at_once]
        block = room[: len(part) * row_bytes]
        # The rows were checked; without `clip`, take() would make a copy to be able to fail.
        np.take(source, part, axis=0, out=block.reshape(len(part), row_bytes), mode="clip")
        yield block
