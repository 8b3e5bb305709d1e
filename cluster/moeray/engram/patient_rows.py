"""A layer call that waits for rows nobody brings just now, as the hop waits for experts nobody has."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from time import monotonic, sleep

from moeray.engram.rows import AskedRows, IntArray, RowsUnavailable, StoredRows
from moeray.engram.served_rows import ServedRows

logger = logging.getLogger(__name__)

RETRY_S = 0.1
OnWaiting = Callable[[bool], None]
"""`on_waiting(True)` when a call begins to wait, `on_waiting(False)` once it ends."""


class PatientRows:
    """Rows of row servers; what is unavailable is asked for again, for `wait_s` at most. See `EngramRows`.

    Attributes:
        on_waiting: told when a call waits; may be set at any time.
    """

    def __init__(self, rows: ServedRows, wait_s: float, on_waiting: OnWaiting = lambda _: None) -> None:
        self._rows, self._wait_s, self.on_waiting = rows, wait_s, on_waiting

    def move(self, addresses: Mapping[int, str]) -> None:
        """Where the servers are from now on; from any thread."""
        self._rows.move(addresses)

    def ask(self, rows_LTC: IntArray) -> _PatientAsk:
        return _PatientAsk(self._rows, rows_LTC, self._wait_s, self.on_waiting)

    def prefetch(self, rows_LTC: IntArray) -> None:
        self._rows.prefetch(rows_LTC)

    def close(self) -> None:
        self._rows.close()


class _PatientAsk:
    def __init__(self, rows: ServedRows, rows_LTC: IntArray, wait_s: float, on_waiting: OnWaiting) -> None:
        self._rows, self._rows_LTC, self._wait_s, self._on_waiting = rows, rows_LTC, wait_s, on_waiting
        self._asked: AskedRows = rows.ask(rows_LTC)

    def take(self, layer: int) -> StoredRows:
        try:
            return self._asked.take(layer)
        except RowsUnavailable as error:
            logger.error("%s; waiting for them for %g s", error, self._wait_s)
        self._on_waiting(True)
        try:
            return self._take_late(layer)
        finally:
            self._on_waiting(False)

    def _take_late(self, layer: int) -> StoredRows:
        deadline = monotonic() + self._wait_s
        while True:
            self._asked = self._rows.ask(self._rows_LTC)
            try:
                return self._asked.take(layer)
            except RowsUnavailable as error:
                if monotonic() + RETRY_S > deadline:
                    raise RowsUnavailable(f"{error}; waited for {self._wait_s:g} s") from error
            sleep(RETRY_S)
