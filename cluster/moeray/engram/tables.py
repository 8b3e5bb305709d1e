"""Where the tables of a model's Engram layers lie on disk, and a read-only map of some of their rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from moeray.engram.mapped import FileRange
from moeray.engram.rows import Bytes


@dataclass(frozen=True, slots=True)
class RowFile:
    """Rows of `row_bytes` each, one after the other from `offset` (bytes) of `file`."""

    file: Path
    offset: int
    row_bytes: int

    def mapped(self, first: int, stop: int) -> Bytes:
        """uint8 [stop - first, row_bytes]: these rows, read-only; pages are shared with all who map the file.

        Raises:
            OSError, ValueError: the file is not there, or is too short.
        """
        shape = (stop - first, self.row_bytes)
        return np.memmap(self.file, np.uint8, mode="r", offset=self.offset + first * self.row_bytes, shape=shape)

    def range(self, first: int, stop: int) -> FileRange:
        """Where these rows lie."""
        return FileRange(self.file, self.offset + first * self.row_bytes, (stop - first) * self.row_bytes)


@dataclass(frozen=True, slots=True)
class TableFiles:
    """One layer's table.

    Attributes:
        name: of the tensor, for messages.
        scales: None where the format has none.
        column_starts: [C + 1] first row of each hash column; the last is the number of rows.
    """

    name: str
    values: RowFile
    scales: RowFile | None
    column_starts: tuple[int, ...]

    @property
    def num_rows(self) -> int:
        return self.column_starts[-1]

    @property
    def scale_bytes(self) -> int:
        """Of one row; 0 where there are none."""
        return 0 if self.scales is None else self.scales.row_bytes

    @property
    def row_bytes(self) -> int:
        """Of one row, with its scales."""
        return self.values.row_bytes + self.scale_bytes


@dataclass(frozen=True, slots=True)
class TableSet:
    """The tables of all Engram layers of one checkpoint.

    Attributes:
        content: id of the checkpoint's content; rows of another one are never taken for this one's.
    """

    content: str
    tables: tuple[TableFiles, ...]

    def __post_init__(self) -> None:
        if not self.tables or len({len(table.column_starts) for table in self.tables}) != 1:
            raise ValueError("Engram tables: at least one, all with the same number of hash columns")

    @property
    def num_columns(self) -> int:
        """Hash columns of each table (C)."""
        return len(self.tables[0].column_starts) - 1

    def names(self, layers: Sequence[int]) -> str:
        """For messages."""
        return ", ".join(self.tables[layer].name for layer in layers)
