"""Rows of Engram tables in Redis: `rows_per_key` neighbours under one key, each value with a checksum.

Keys carry the checkpoint's content id, so that checkpoints share a Redis and none reads another's rows. A value that is
not exactly what was stored is not there.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from redis import Redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from moeray.engram.rows import Bytes, IntArray
from moeray.engram.tables import TableSet
from moeray.kv_cache.blocks import StoreFailed
from moeray.kv_cache.frame import header, unframed
from moeray.kv_cache.redis_blocks import ANSWERED_WRONGLY

PREFIX = "moeray-engram"
BATCH_KEYS = 4096
BATCH_BYTES = 4 << 20
"""Of one round trip."""


class RedisPages:
    """See module docstring. Connects when it is first used; thread-safe.

    Args:
        url: redis://host:port/database, or rediss:// with TLS; without a password.
        timeout_s: a call is given up when Redis says nothing for so long.
        tls_ca_file: PEM of the authority of rediss://; empty: the system's.
    """

    def __init__(
        self,
        url: str,
        password: str | None,
        tables: TableSet,
        *,
        rows_per_key: int,
        timeout_s: float,
        tls_ca_file: str = "",
    ) -> None:
        self.where, self.tables, self.rows_per_key = url, tables, rows_per_key
        options: dict[str, Any] = {"ssl_ca_certs": tls_ca_file} if tls_ca_file else {}
        self._client: Any = Redis.from_url(
            url, password=password, socket_timeout=timeout_s, socket_connect_timeout=timeout_s,
            retry=Retry(NoBackoff(), 0), **options,
        )  # fmt: skip

    def load(self, layer: int, rows_N: IntArray, values: Bytes, scales: Bytes) -> IntArray:
        """Copy rows to their places.

        Args:
            rows_N: ascending.
            values, scales: uint8 [N, ...]; written where the row is there.
        Returns:
            indices (of N) of those that are not.
        Raises:
            StoreFailed: Redis did not answer, or refused.
        """
        pages_P, page_N = np.unique(rows_N // self.rows_per_key, return_inverse=True)
        is_there_P = np.zeros(len(pages_P), dtype=bool)
        at_once = self._at_once(layer)
        for first in range(0, len(pages_P), at_once):
            found, data = self._pages(layer, pages_P[first : first + at_once])
            is_there_P[first : first + at_once] = found
            here = np.flatnonzero((page_N >= first) & (page_N < first + at_once) & is_there_P[page_N])
            if len(here):
                at = (np.cumsum(found) - 1)[page_N[here] - first]
                self._copy(layer, data, at, rows_N[here] % self.rows_per_key, here, values, scales)
        return np.flatnonzero(~is_there_P[page_N])

    def store(self, layer: int, pages_P: IntArray) -> None:
        """Put these pages there, from the checkpoint's file.

        Raises:
            StoreFailed: as `load`; OSError, ValueError: the file cannot be mapped.
        """
        at_once = self._at_once(layer)
        for first in range(0, len(pages_P), at_once):
            part = pages_P[first : first + at_once]
            pages = self._from_file(layer, part)
            with self._saying():
                pipeline = self._client.pipeline(transaction=False)
                for key, page in zip(self._keys(layer, part), pages, strict=True):
                    pipeline.set(key, b"".join((header(key, page.data), page.data)))
                pipeline.execute()

    def fill(self, progress: Callable[[int, int], None]) -> None:
        """Put all rows there.

        Args:
            progress: called with (rows that are there, rows in all) after each round trip.
        Raises:
            As `store`.
        """
        total, done = sum(table.num_rows for table in self.tables.tables), 0
        for layer, table in enumerate(self.tables.tables):
            num_pages, at_once = -(-table.num_rows // self.rows_per_key), self._at_once(layer)
            for first in range(0, num_pages, at_once):
                stop = min(num_pages, first + at_once)
                self.store(layer, np.arange(first, stop))
                progress(done + min(table.num_rows, stop * self.rows_per_key), total)
            done += table.num_rows

    def close(self) -> None:
        self._client.close()

    def _at_once(self, layer: int) -> int:
        return max(1, min(BATCH_KEYS, BATCH_BYTES // self._page_bytes(layer)))

    def _page_bytes(self, layer: int) -> int:
        return self.rows_per_key * self.tables.tables[layer].row_bytes

    def _keys(self, layer: int, pages_P: IntArray) -> list[bytes]:
        prefix = f"{PREFIX}:{self.tables.content}:{self.rows_per_key}:{layer}:".encode()
        packed = np.ascontiguousarray(pages_P, dtype=">i8").tobytes()
        return [prefix + packed[at : at + 8] for at in range(0, len(packed), 8)]

    def _pages(self, layer: int, pages_P: IntArray) -> tuple[list[bool], Bytes]:
        """Which are there, and the bytes of those."""
        page_bytes, keys = self._page_bytes(layer), self._keys(layer, pages_P)
        with self._saying():
            stored = self._client.mget(keys)
            pages = [
                None if each is None else unframed(each, key, page_bytes)
                for key, each in zip(keys, stored, strict=True)
            ]
        data = np.frombuffer(b"".join(page for page in pages if page is not None), dtype=np.uint8)
        return [page is not None for page in pages], data.reshape(-1, page_bytes)

    def _copy(
        self, layer: int, data: Bytes, at: IntArray, within: IntArray, here: IntArray, values: Bytes, scales: Bytes
    ) -> None:
        """Rows `within` pages `at` of the data to the places `here`."""
        table, count = self.tables.tables[layer], self.rows_per_key
        value_bytes = count * table.values.row_bytes
        values[here] = data[:, :value_bytes].reshape(-1, count, table.values.row_bytes)[at, within]
        if table.scale_bytes:
            scales[here] = data[:, value_bytes:].reshape(-1, count, table.scale_bytes)[at, within]

    def _from_file(self, layer: int, pages_P: IntArray) -> Bytes:
        """uint8 [P, bytes of a page]; behind the table's end, its last row is repeated: nobody asks for it there."""
        table = self.tables.tables[layer]
        rows = (pages_P[:, None] * self.rows_per_key + np.arange(self.rows_per_key)).clip(max=table.num_rows - 1)
        parts = [
            part.mapped(0, table.num_rows)[rows].reshape(len(pages_P), -1)
            for part in (table.values, table.scales)
            if part is not None
        ]
        return np.concatenate(parts, axis=1)

    @contextlib.contextmanager
    def _saying(self) -> Iterator[None]:
        try:
            yield
        except ANSWERED_WRONGLY as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise StoreFailed(f"Redis at {self.where}: {reason}") from error
