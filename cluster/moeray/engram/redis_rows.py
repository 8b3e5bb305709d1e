"""Engram tables in Redis, behind a bounded cache of hot rows in this process.

Where the checkpoint's file is at hand, a row that Redis does not bring comes from the file, and its page is put into
Redis; where it is not, that row is an error and never a zero.

Suffixes: L Engram layers, T tokens, C hash columns, N distinct rows of a layer, M those of them that are not hot.
"""

from __future__ import annotations

import logging
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np

from moeray.engram.hot_rows import HotRows
from moeray.engram.redis_pages import RedisPages
from moeray.engram.rows import Bytes, IntArray, RowsUnavailable, StoredRows
from moeray.kv_cache.blocks import StoreFailed
from moeray.kv_cache.breaker import Breaker

logger = logging.getLogger(__name__)

MAX_QUEUED = 4
"""Pages to be stored that wait; what comes while there are so many is left."""


class RedisRows:
    """See module docstring; implements `EngramRows`.

    Args:
        hot_bytes: of this process' memory, divided among the tables by the bytes of their rows.
        has_file: the files that the pages' tables name are there.
    Raises:
        OSError, ValueError: a file cannot be mapped.
    """

    def __init__(self, pages: RedisPages, *, hot_bytes: int, has_file: bool) -> None:
        self._pages, self._tables = pages, pages.tables.tables
        sizes = [table.num_rows * table.row_bytes for table in self._tables]
        self._hot = [
            HotRows(table.values.row_bytes, table.scale_bytes, hot_bytes * size // sum(sizes))
            for table, size in zip(self._tables, sizes, strict=True)
        ]
        self._files: list[tuple[Bytes, Bytes | None]] | None = None
        if has_file:
            self._files = [
                (each.values.mapped(0, each.num_rows), each.scales.mapped(0, each.num_rows) if each.scales else None)
                for each in self._tables
            ]
        self._breaker = Breaker()
        self._fetching = ThreadPoolExecutor(1, "moeray-redis-rows")
        self._beside = ThreadPoolExecutor(1, "moeray-redis-rows-beside")
        self._queued: list[Future[None]] = []

    def ask(self, rows_LTC: IntArray) -> _Asked:
        return _Asked([self._begin(layer, rows_TC) for layer, rows_TC in enumerate(rows_LTC)])

    def prefetch(self, rows_LTC: IntArray) -> None:
        """Make them hot."""
        for layer, rows_TC in enumerate(rows_LTC):
            cold = self._hot[layer].missing(np.unique(rows_TC))
            if len(cold):
                try:
                    self._fetch(layer, cold)
                except RowsUnavailable as error:
                    logger.debug("not prefetched: %s", error)  # whoever asks for them gets the error

    def close(self) -> None:
        for executor in (self._fetching, self._beside):
            executor.shutdown(wait=True, cancel_futures=True)
        self._pages.close()

    def _begin(self, layer: int, rows_TC: IntArray) -> _Layer:
        rows_N, index = np.unique(rows_TC, return_inverse=True)
        values, scales = self._room(layer, len(rows_N))
        missing_M = self._hot[layer].bring(rows_N, values, scales)
        has_scales = self._tables[layer].scales is not None
        stored = StoredRows(values, scales if has_scales else None, index.reshape(rows_TC.shape))
        coming = None
        if len(missing_M):
            coming = self._fetching.submit(self._fetch_into, layer, rows_N, missing_M, values, scales)
        return _Layer(stored, coming)

    def _room(self, layer: int, count: int) -> tuple[Bytes, Bytes]:
        table = self._tables[layer]
        shapes = (count, table.values.row_bytes), (count, table.scale_bytes)
        return np.empty(shapes[0], dtype=np.uint8), np.empty(shapes[1], dtype=np.uint8)

    def _fetch_into(self, layer: int, rows_N: IntArray, missing_M: IntArray, values: Bytes, scales: Bytes) -> None:
        values[missing_M], scales[missing_M] = self._fetch(layer, rows_N[missing_M])

    def _fetch(self, layer: int, rows_M: IntArray) -> tuple[Bytes, Bytes]:
        """Bring rows (ascending) that are not hot, and keep them.

        Raises:
            RowsUnavailable: they are not in Redis, and there is no file.
        """
        values, scales = self._room(layer, len(rows_M))
        absent, reason = np.arange(len(rows_M)), self._breaker.reason
        if self._breaker.allows():
            try:
                absent = self._pages.load(layer, rows_M, values, scales)
                self._breaker.succeeded()
                reason = "it does not have them (flushed, or never loaded?)"
            except StoreFailed as error:
                reason = str(error)
                if self._breaker.failed(reason):
                    logger.warning("Engram rows: %s; it is left alone for a while", reason)
        if len(absent):
            self._read_file(layer, rows_M, absent, values, scales, reason)
        self._hot[layer].keep(rows_M, values, scales)
        return values, scales

    def _read_file(
        self, layer: int, rows_M: IntArray, absent: IntArray, values: Bytes, scales: Bytes, reason: str
    ) -> None:
        rows = rows_M[absent]
        if self._files is None:
            raise RowsUnavailable(
                f"{len(rows)} rows of {self._tables[layer].name} (the first is {rows[0]}): "
                f"Redis at {self._pages.where}: {reason}"
            )
        mapped_values, mapped_scales = self._files[layer]
        values[absent] = mapped_values[rows]
        if mapped_scales is not None:
            scales[absent] = mapped_scales[rows]
        if self._breaker.is_closed:
            self._later(self._store, layer, np.unique(rows // self._pages.rows_per_key))

    def _store(self, layer: int, pages_P: IntArray) -> None:
        try:
            self._pages.store(layer, pages_P)
        except StoreFailed as error:
            self._breaker.failed(str(error))

    def _later(self, work: object, *arguments: object) -> None:
        self._queued = [each for each in self._queued if not each.done()]
        if len(self._queued) < MAX_QUEUED:
            self._queued.append(self._beside.submit(work, *arguments))  # type: ignore[arg-type]


class _Layer:
    def __init__(self, stored: StoredRows, coming: Future[None] | None) -> None:
        self.stored, self._coming = stored, coming

    def arrived(self) -> StoredRows:
        if self._coming is not None:
            self._coming.result()
        return self.stored


class _Asked:
    """Implements `AskedRows`."""

    def __init__(self, layers: list[_Layer]) -> None:
        self._layers = layers

    def take(self, layer: int) -> StoredRows:
        return self._layers[layer].arrived()
