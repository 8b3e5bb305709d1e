"""Tables as read-only maps of the files that hold them: one copy in a node's memory, whatever the number of shards.

The kernel keeps a file's pages once for all processes that map it. Nothing is copied: a row is read where it lies.
"""

from __future__ import annotations

import contextlib
import logging
import mmap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from moeray.engram.rows import Bytes, IntArray, StoredRows

logger = logging.getLogger(__name__)

SLICE_BYTES = 256 << 20
"""Brought into memory at a time, between two words of progress."""
ROWS_AT_ONCE = 4096
"""Read ahead in one go: what they take meanwhile is a few MiB."""
_POPULATE_READ = 22
"""MADV_POPULATE_READ, of Linux 5.14; Python 3.11 does not name it."""


@dataclass(frozen=True, slots=True)
class FileRange:
    """Bytes of a file."""

    file: Path
    offset: int
    num_bytes: int


@dataclass(frozen=True, slots=True)
class Table:
    """One layer's rows: uint8 [V, bytes of a row's values] and, where the format has scales, [V, bytes of them]."""

    values: Bytes
    scales: Bytes | None

    def copied(self) -> Table:
        """In memory of this process alone."""
        return Table(np.array(self.values), None if self.scales is None else np.array(self.scales))


class LocalTables:
    """Tables that this process can read itself, mapped or its own; implements `EngramRows`."""

    def __init__(self, tables: Sequence[Table]) -> None:
        self._tables = tuple(tables)

    def ask(self, rows_LTC: IntArray) -> LocalRows:
        return LocalRows(self._tables, rows_LTC)

    def prefetch(self, rows_LTC: IntArray) -> None:
        """Read them, so that they are in the node's memory: for tables that were not brought there (`prefault`)."""
        for table, rows_TC in zip(self._tables, rows_LTC, strict=True):
            rows_N = np.unique(rows_TC)
            for first in range(0, len(rows_N), ROWS_AT_ONCE):
                for part in (table.values, table.scales):
                    if part is not None:
                        np.take(part, rows_N[first : first + ROWS_AT_ONCE], axis=0)  # without the GIL

    def close(self) -> None:
        self._tables = ()


@dataclass(frozen=True, slots=True)
class LocalRows:
    """Implements `AskedRows`: the whole table is the answer."""

    tables: tuple[Table, ...]
    rows_LTC: IntArray

    def take(self, layer: int) -> StoredRows:
        table = self.tables[layer]
        return StoredRows(table.values, table.scales, self.rows_LTC[layer])


def prefault(ranges: Sequence[FileRange], progress: Callable[[int, int], None]) -> None:
    """Bring these bytes into the node's memory, so that no request waits for a disk; once there, it takes no time.

    Args:
        progress: told (bytes so far, bytes in all) after every SLICE_BYTES.
    Raises:
        OSError: a file cannot be read.
    """
    total, done = sum(each.num_bytes for each in ranges), 0
    for each in ranges:
        start = each.offset // mmap.ALLOCATIONGRANULARITY * mmap.ALLOCATIONGRANULARITY
        length = each.offset + each.num_bytes - start
        with (
            each.file.open("rb") as stream,
            mmap.mmap(stream.fileno(), length, prot=mmap.PROT_READ, offset=start) as mapped,
        ):
            ask_for_huge_pages(mapped)
            for first in range(0, length, SLICE_BYTES):
                _populate(mapped, first, min(SLICE_BYTES, length - first))
                done += min(SLICE_BYTES, length - first)
                progress(min(done, total), total)


def ask_for_huge_pages(mapped: mmap.mmap) -> None:
    """Where the file system has them: fewer misses of the TLB. Most have none for files, and none is an error."""
    with contextlib.suppress(OSError, AttributeError):
        mapped.madvise(mmap.MADV_HUGEPAGE)


def _populate(mapped: mmap.mmap, first: int, length: int) -> None:
    try:
        mapped.madvise(_POPULATE_READ, first, length)
    except OSError:  # an older kernel: touch every page
        for page in range(first, first + length, mmap.PAGESIZE):
            mapped[page]
