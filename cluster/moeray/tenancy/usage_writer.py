"""Usage records on their way to a store: the event loop hands them over and goes on, a thread writes.

While the store fails, records wait in memory, MAX_WAITING of them; what comes beyond that is counted, and the log
itself says so when it can be written again. Nothing is lost without that.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from itertools import islice
from typing import Protocol

from moeray.tenancy.usage import LostRecords, UsageRecord

MAX_WAITING = 100_000
MAX_BATCH = 1000
PAUSE_S = 0.2
"""Between two looks at the queue, and between two tries."""
_logger = logging.getLogger(__name__)


class UsageSink(Protocol):
    """A store. Calls block; write and sync may raise OSError."""

    def write(self, lines: list[bytes]) -> None: ...

    def sync(self) -> None: ...

    def close(self) -> None: ...


class UsageWriter:
    """`record` from any thread; `close` writes what waits.

    Attributes:
        num_lost: records given up so far.
        problem: why the store cannot be written, None if it can.
    """

    def __init__(self, sink: UsageSink, *, max_waiting: int = MAX_WAITING) -> None:
        self._sink, self._max_waiting = sink, max_waiting
        self._waiting: deque[UsageRecord] = deque()
        self._lock = threading.Lock()
        self._unsaid = 0
        self.num_lost = 0
        self.problem: str | None = None
        self._ending = threading.Event()
        self._thread = threading.Thread(target=self._run, name="usage", daemon=True)
        self._thread.start()

    def record(self, record: UsageRecord) -> None:
        """Take it; never waits for the store."""
        with self._lock:  # never held while writing
            if len(self._waiting) < self._max_waiting:
                self._waiting.append(record)
                return
            self.num_lost += 1
            self._unsaid += 1

    def close(self, timeout_s: float = 5.0) -> None:
        """Write what waits, for so long at the most; the rest is lost, and said in the process's own log."""
        self._ending.set()
        self._thread.join(timeout_s)
        with self._lock:
            left = len(self._waiting)
            self.num_lost += left
            self._waiting.clear()
        if left or self._unsaid:
            _logger.error("%d usage records were lost: %s", left + self._unsaid, self.problem)

    def _run(self) -> None:
        while not self._ending.wait(PAUSE_S):
            self._write_all()
        self._write_all()
        try:
            self._sink.close()
        except OSError as error:
            self._failed(error)

    def _write_all(self) -> None:
        """Until nothing waits or the store fails; what failed stays first in the queue."""
        while True:
            with self._lock:
                batch = list(islice(self._waiting, MAX_BATCH))
                unsaid = self._unsaid
            try:
                self._write(batch, unsaid)
            except OSError as error:
                self._failed(error)
                return
            self.problem = None
            with self._lock:
                for _ in batch:
                    self._waiting.popleft()
                self._unsaid -= unsaid
                if not self._waiting:
                    return

    def _write(self, batch: list[UsageRecord], unsaid: int) -> None:
        lines = [each.to_line() for each in batch]
        if unsaid:
            lines.append(LostRecords(time.time(), unsaid).to_line())
        if lines:
            self._sink.write(lines)
        else:
            self._sink.sync()

    def _failed(self, error: OSError) -> None:
        if self.problem is None:
            _logger.error("usage records cannot be written; %d wait in memory: %s", len(self._waiting), error)
        self.problem = str(error)
