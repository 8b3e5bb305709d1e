"""Usage records in files: JSON lines, each process its own files, a new one per day (UTC) and 64 MiB.

Written lines are in the kernel at once (the process may die), and on disk within a second (the machine may).
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

MAX_FILE_BYTES = 64 * 2**20
SYNC_S = 1.0
PREFIX = "usage-"


class UsageFiles:
    """A UsageSink. One thread."""

    def __init__(
        self, folder: Path, name: str, *, keep_days: int, max_bytes: int = MAX_FILE_BYTES,
        clock: Callable[[], float] = time.time,
    ) -> None:  # fmt: skip
        """Nothing is opened yet.

        Args:
            name: of this process, different from that of every other that writes here; without slashes.
            keep_days: files of days before that are removed.
        """
        self._folder, self._name, self._keep_days = folder, name, keep_days
        self._max_bytes, self._clock = max_bytes, clock
        self._file: int | None = None
        self._day, self._num_bytes, self._synced = "", 0, 0.0

    def write(self, lines: list[bytes]) -> None:
        """Append whole lines, all or none.

        Raises:
            OSError: none is there, or (the disk took neither them nor their removal) they may come twice.
        """
        file, data = self._current(), b"".join(lines)
        try:
            begun = 0
            while begun < len(data):
                begun += os.write(file, data[begun:])
        except OSError:
            self._take_back(file)
            raise
        self._num_bytes += len(data)
        self.sync()

    def sync(self) -> None:
        """To disk, once a second at most."""
        if self._file is not None and self._clock() - self._synced >= SYNC_S:
            os.fsync(self._file)
            self._synced = self._clock()

    def close(self) -> None:
        if self._file is not None:
            os.fsync(self._file)
            os.close(self._file)
            self._file = None

    def _take_back(self, file: int) -> None:
        try:
            os.ftruncate(file, self._num_bytes)
        except OSError:
            self._num_bytes = self._max_bytes  # go on in another file; this one ends with a torn line

    def _current(self) -> int:
        day = datetime.fromtimestamp(self._clock(), UTC).date().isoformat()
        if self._file is None or day != self._day or self._num_bytes >= self._max_bytes:
            self.close()
            self._folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            self._file = self._open_next(day)
            self._day, self._num_bytes = day, 0
            self._remove_old(day)
        return self._file

    def _open_next(self, day: str) -> int:
        number = 0
        while True:  # a process before this one may have had its name
            path = self._folder / f"{PREFIX}{day}-{self._name}-{number}.jsonl"
            try:
                return os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_EXCL, 0o600)
            except FileExistsError:
                number += 1

    def _remove_old(self, day: str) -> None:
        oldest = (datetime.fromisoformat(day) - timedelta(days=self._keep_days)).date().isoformat()
        for path in self._folder.glob(f"{PREFIX}*.jsonl"):
            if path.name[len(PREFIX) : len(PREFIX) + 10] < oldest:
                path.unlink(missing_ok=True)  # another ingress may remove it too


def read_usage(folder: Path, *, since: float = float("-inf")) -> Iterator[bytes]:
    """Every line of the days from `since` on, in the order of files."""
    first = datetime.fromtimestamp(since, UTC).date().isoformat() if since > 0 else ""
    for path in sorted(folder.glob(f"{PREFIX}*.jsonl")):
        # A record is written after its end: the file's day may be the next one, never one before.
        if path.name[len(PREFIX) : len(PREFIX) + 10] >= first:
            with path.open("rb") as file:
                yield from file
