"""Blocks in the memory of a node, shared by its processes: a file per block on a file system in memory.

A file appears whole or not at all (written aside, then renamed), so a writer may die at any instant, and readers keep
what they have opened while it is deleted. The budget is of the whole directory, whatever models its blocks are of: what
was used longest ago goes first.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import shutil
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from time import monotonic, sleep, time

from moeray.kv_cache.blocks import StoreFailed, Usage
from moeray.kv_cache.frame import HEADER_BYTES, header, unframed

MAKE_ROOM_SHARE = 0.1
"""Of the budget: so much more than needed is deleted at once, so that room is rarely made."""
STALE_S = 60.0
"""A file aside that is older has lost its writer."""
LOCK_S = 0.25
"""Making room takes milliseconds."""
_ASIDE, _TOTAL = ".new-", ".total"


def default_directory() -> Path:
    """Of this user, on a file system in memory."""
    return Path(f"/dev/shm/moeray-kv-{os.getuid()}")  # noqa: S108  made and checked for its owner by NodeBlocks


@dataclass(frozen=True, slots=True)
class _Ledger:
    """The number of bytes in the directory, as whoever wrote last knew it."""

    descriptor: int

    def read(self) -> int | None:
        text = os.pread(self.descriptor, 20, 0)
        return int(text) if text.isdigit() else None

    def write(self, total: int) -> None:
        os.pwrite(self.descriptor, b"%020d" % total, 0)


class NodeBlocks:
    """See module docstring; implements `BlockStore`.

    Args:
        directory: made with all its parents if it is not there; of this user, closed to others.
        budget_bytes: of all files of the directory, of all processes.
    Raises:
        StoreFailed: the directory cannot be made, or belongs to somebody else.
    """

    name = "node"

    def __init__(self, directory: Path, namespace: str, block_bytes: int, budget_bytes: int) -> None:
        self.where, self.namespace = str(directory), namespace
        self._directory, self._blocks = directory, directory / namespace
        self._block_bytes, self._budget_bytes = block_bytes, budget_bytes
        with self._saying("made"):
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            owner = directory.stat().st_uid
            if owner != os.getuid():
                raise StoreFailed(
                    f"kv_cache.host_directory: {directory} belongs to user {owner}, this process is of {os.getuid()}"
                )
            self._blocks.mkdir(mode=0o700, exist_ok=True)

    def has(self, names: Sequence[bytes]) -> list[bool]:
        return [os.path.exists(self._file(name)) for name in names]  # noqa: PTH110  a fifth of Path's time

    def load(self, names: Sequence[bytes]) -> Iterator[memoryview | None]:
        for name in names:
            yield self._load(self._file(name))

    def store(self, names: Sequence[bytes], blocks: Sequence[memoryview]) -> int:
        new = [(name, block) for name, block, there in zip(names, blocks, self.has(names), strict=True) if not there]
        if not new:
            return 0
        with self._saying("written to"):
            self._reserve(len(new) * (HEADER_BYTES + self._block_bytes))
            for name, block in new:
                self._store(name, block)
        return len(new)

    def touch(self, names: Sequence[bytes]) -> None:
        for name in names:
            with contextlib.suppress(OSError):
                os.utime(self._file(name))

    def usage(self) -> Usage:
        with self._saying("read"):
            sizes = [entry.stat().st_size for entry in os.scandir(self._blocks)]
        return Usage(len(sizes), sum(sizes), self._budget_bytes)

    def flush(self) -> int:
        count = 0
        with self._saying("emptied"), self._ledger() as ledger:
            for entry in os.scandir(self._blocks):
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(entry.path)  # noqa: PTH108
                    count += 1
            ledger.write(sum(size for _, size, _ in self._files()))
        return count

    def close(self) -> None:
        """Nothing is held."""

    def _file(self, name: bytes) -> str:
        return f"{self._blocks}/{name.hex()}"

    def _load(self, file: str) -> memoryview | None:
        try:
            with open(file, "rb", buffering=0) as stream:  # noqa: PTH123
                stored = bytearray(HEADER_BYTES + self._block_bytes + 1)
                size = stream.readinto(stored)
        except FileNotFoundError:
            return None
        except OSError as error:
            raise StoreFailed(f"kv_cache.host_directory: {file} cannot be read: {error.strerror}") from error
        block = unframed(memoryview(stored)[:size], self._block_bytes)
        if block is None:
            with contextlib.suppress(OSError):
                os.unlink(file)  # noqa: PTH108
        return block

    def _store(self, name: bytes, block: memoryview) -> None:
        aside = f"{self._blocks}/{_ASIDE}{os.getpid()}-{threading.get_ident()}-{name.hex()}"
        try:
            descriptor = os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            try:
                written = os.writev(descriptor, [header(block), block])
            finally:
                os.close(descriptor)
            if written != HEADER_BYTES + block.nbytes:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            os.rename(aside, self._file(name))  # noqa: PTH104
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(aside)  # noqa: PTH108
            raise

    @contextlib.contextmanager
    def _saying(self, what: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            room = shutil.disk_usage(self._directory).free >> 20 if self._directory.exists() else 0
            raise StoreFailed(
                f"kv_cache.host_directory: {self.where} cannot be {what}: {error.strerror} ({room} MiB are free there)"
            ) from error

    # ---- the budget

    def _reserve(self, more: int) -> None:
        """Count `more` bytes in, deleting what was used longest ago where they do not fit.

        What is counted and then not written (its writer died, another wrote the same block) is found when room is made:
        then everything is counted anew.
        """
        with self._ledger() as ledger:
            total = ledger.read()
            if total is None or total + more > self._budget_bytes:
                total = self._make_room(more)
            ledger.write(total + more)

    def _make_room(self, more: int) -> int:
        """Delete until `more` bytes fit, and some beyond; bytes that remain."""
        files = sorted(self._files())
        total = sum(size for _, size, _ in files)
        if total + more <= self._budget_bytes:
            return total
        wanted = max(0, self._budget_bytes - more - int(MAKE_ROOM_SHARE * self._budget_bytes))
        for _, size, path in files:
            if total <= wanted:
                break
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)  # noqa: PTH108
            total -= size
        return total

    @contextlib.contextmanager
    def _ledger(self) -> Iterator[_Ledger]:
        """What the directory holds, for one process of the node at a time."""
        descriptor = os.open(self._directory / _TOTAL, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            deadline = monotonic() + LOCK_S
            while True:
                try:
                    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    if monotonic() > deadline:  # its holder is stopped: the kernel frees it when that is killed
                        raise StoreFailed(
                            f"kv_cache.host_directory: {self.where} is locked by a hung process"
                        ) from None
                    sleep(0.001)
            yield _Ledger(descriptor)
        finally:
            os.close(descriptor)

    def _files(self) -> list[tuple[float, int, str]]:
        """(last use, bytes, path) of every block of every namespace; sweeps what lost its writer."""
        found = []
        for namespace in os.scandir(self._directory):
            if not namespace.is_dir(follow_symlinks=False):
                continue
            for entry in os.scandir(namespace.path):
                with contextlib.suppress(FileNotFoundError):
                    status = entry.stat()
                    if entry.name.startswith(_ASIDE) and time() - status.st_mtime > STALE_S:
                        os.unlink(entry.path)  # noqa: PTH108
                        continue
                    found.append((status.st_mtime, status.st_size, entry.path))
        return found
