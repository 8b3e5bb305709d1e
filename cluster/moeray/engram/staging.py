"""Where the rows of one step come together: each distinct row once, ascending, in buffers that live on.

Suffixes: L Engram layers, T tokens, C hash columns, N distinct rows of a layer.
"""

from __future__ import annotations

import numpy as np

from moeray.engram.row_wire import request
from moeray.engram.rows import Bytes, IntArray, StoredRows
from moeray.engram.shares import Shares
from moeray.engram.tables import TableFiles, TableSet


class _LayerRoom:
    """One layer's rows; the room grows with the largest step and is never given back."""

    def __init__(self, table: TableFiles, starts: IntArray) -> None:
        self._table, self._starts = table, starts
        self._values: Bytes = np.empty(0, dtype=np.uint8)
        self._scales: Bytes = np.empty(0, dtype=np.uint8)
        self.set(np.empty((0, 1), dtype=np.int64))

    def set(self, rows_TC: IntArray) -> None:
        """Make room for the distinct ones of these."""
        self.rows_N, index = np.unique(rows_TC, return_inverse=True)
        self.index_TC: IntArray = index.reshape(rows_TC.shape)
        # Columns are ranges of rows, so each share's rows are together.
        self.bounds = np.searchsorted(self.rows_N, self._starts)
        count = len(self.rows_N)
        if self._values.nbytes < count * self._table.values.row_bytes:
            self._values = np.empty(count * self._table.values.row_bytes, dtype=np.uint8)
        if self._scales.nbytes < count * self._table.scale_bytes:
            self._scales = np.empty(count * self._table.scale_bytes, dtype=np.uint8)

    def rows_of(self, share: int) -> IntArray:
        return self.rows_N[self.bounds[share] : self.bounds[share + 1]]

    def places(self, shares: tuple[int, ...]) -> list[memoryview]:
        """Where the rows' values go, then their scales; none is empty."""
        found = []
        for room, row_bytes in ((self._values, self._table.values.row_bytes), (self._scales, self._table.scale_bytes)):
            for share in shares:
                first, stop = (int(self.bounds[each]) * row_bytes for each in (share, share + 1))
                if first < stop:
                    found.append(room.data[first:stop])
        return found

    def stored(self) -> StoredRows:
        count, table = len(self.rows_N), self._table
        values = self._values[: count * table.values.row_bytes].reshape(count, table.values.row_bytes)
        if table.scales is None:
            return StoredRows(values, None, self.index_TC)
        scales = self._scales[: count * table.scale_bytes].reshape(count, table.scale_bytes)
        return StoredRows(values, scales, self.index_TC)


class Staging:
    """Rooms of all layers, and what each share has to bring into them."""

    def __init__(self, tables: TableSet, shares: Shares) -> None:
        self._shares = shares
        columns = [*(shares.columns(share).start for share in range(shares.num_servers)), shares.num_columns]
        self._layers = [
            _LayerRoom(table, np.array([table.column_starts[column] for column in columns], dtype=np.int64))
            for table in tables.tables
        ]

    def set(self, rows_LTC: IntArray) -> None:
        """The rows of a step; what was there before is void."""
        for layer, rows_TC in zip(self._layers, rows_LTC, strict=True):
            layer.set(rows_TC)

    def shares_asked(self) -> tuple[int, ...]:
        """Those that have a row to bring."""
        return tuple(
            share
            for share in range(self._shares.num_servers)
            if any(layer.bounds[share] < layer.bounds[share + 1] for layer in self._layers)
        )

    def request(self, number: int, shares: tuple[int, ...]) -> bytes:
        """For these shares (ascending) of all layers."""
        return request(number, [np.concatenate([each.rows_of(share) for share in shares]) for each in self._layers])

    def places(self, shares: tuple[int, ...]) -> list[memoryview]:
        """Where the answer goes."""
        return [place for layer in self._layers for place in layer.places(shares)]

    def layers_with(self, shares: tuple[int, ...]) -> list[int]:
        """Layers that these shares bring rows of."""
        return [index for index, each in enumerate(self._layers) if any(len(each.rows_of(share)) for share in shares)]

    def stored(self, layer: int) -> StoredRows:
        return self._layers[layer].stored()
