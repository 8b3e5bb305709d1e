"""Rows of Engram tables, wherever they lie: the seam between a model's layer and the placement of its tables.

Suffixes: T tokens of a step, L Engram layers, C hash columns, V rows of a table, N rows that were brought.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

IntArray = npt.NDArray[np.int64]
Bytes = npt.NDArray[np.uint8]


class RowsUnavailable(RuntimeError):
    """Nobody who has these rows answered in time. Never are zeros put in their place."""


@dataclass(frozen=True, slots=True)
class StoredRows:
    """Rows as they are stored, and where among them each (token, column) finds its own.

    Attributes:
        values: uint8 [V or N, bytes of a row's values]; a map of the whole table, or only the rows that were brought.
        scales: uint8 [V or N, bytes of a row's scales]; None where the format has none.
        index_TC: rows of `values` and `scales`.
    """

    values: Bytes
    scales: Bytes | None
    index_TC: IntArray


class AskedRows(Protocol):
    """The rows of one step, on their way."""

    def take(self, layer: int) -> StoredRows:
        """Those of one Engram layer (0 <= layer < L); waits until they are there.

        Raises:
            RowsUnavailable: they will not come.
        """


class EngramRows(Protocol):
    """The tables of all Engram layers of one model. One thread asks; several processes of a node may share memory."""

    def ask(self, rows_LTC: IntArray) -> AskedRows:
        """Begin to bring the rows of a step; returns at once. Rows were checked: 0 <= row < rows of the layer's table.

        An answer is good until the next `ask`.
        """

    def prefetch(self, rows_LTC: IntArray) -> None:
        """Bring rows that a step will ask for soon (a prompt in the queue) nearer; may take its time, or do nothing.

        From any thread but the one that asks.
        """

    def close(self) -> None:
        """Give back memory, threads and connections; idempotent."""
