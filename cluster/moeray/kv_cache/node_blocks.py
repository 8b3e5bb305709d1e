"""Blocks in the memory of a node, shared by its processes: a file per block on a file system in memory.

A file appears whole or not at all (written aside, then renamed), so a writer may die at any instant, and readers keep
what they have opened while it is deleted. The budget is of the whole directory, whatever models its blocks are of: what
was used longest ago goes first. Where the file system has less room than the budget, that is the budget.
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
SPARE_SHARE, SPARE_BYTES = 0.05, 64 << 20
"""Of the file system, at most so much: is left free for what else lies there and dies of a full one (a SIGBUS)."""
LOCK_S = 2.0
"""Making room takes 7 us a block: milliseconds for thousands, 0.7 s for a hundred thousand."""
OTHERS_MAY_WRITE = 0o022
_BLOCK, _ASIDE, _TOTAL = ".kv", ".new-", ".total"


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
        directory: made with all its parents if it is not there; of this user, nobody else may write to it.
        budget_bytes: of all files of the directory, of all processes.
    Raises:
        StoreFailed: the directory cannot be made, belongs to somebody else, or is open to others.
    """

    name = "node"

    def __init__(self, directory: Path, namespace: str, block_bytes: int, budget_bytes: int) -> None:
        self.where, self.namespace = str(directory), namespace
        self._directory, self._blocks = directory, directory / namespace
        self._block_bytes, self._budget_bytes = block_bytes, budget_bytes
        with self._saying("made"):
            self._make()

    def has(self, names: Sequence[bytes]) -> list[bool]:
        return [os.path.exists(self._file(name)) for name in names]  # noqa: PTH110  a fifth of Path's time

    def load(self, names: Sequence[bytes]) -> Iterator[memoryview | None]:
        for name in names:
            yield self._load(name)

    def store(self, names: Sequence[bytes], blocks: Sequence[memoryview]) -> int:
        there = self.has(names)
        new = {name: block for name, block, is_there in zip(names, blocks, there, strict=True) if not is_there}
        if not new:
            return 0
        with self._saying("written to"):
            asides = self._reserve(list(new))
            try:
                for (name, block), aside in zip(new.items(), asides, strict=False):
                    self._write(aside, name, block)
                with self._ledger():  # who counts meanwhile could miss what is renamed under his eyes
                    for name, aside in zip(new, asides, strict=False):
                        os.rename(aside, self._file(name))  # noqa: PTH104
            except BaseException:
                for aside in asides:
                    with contextlib.suppress(OSError):
                        os.unlink(aside)  # noqa: PTH108
                raise
        return len(asides)

    def touch(self, names: Sequence[bytes]) -> None:
        for name in names:
            with contextlib.suppress(OSError):
                os.utime(self._file(name))

    def usage(self) -> Usage:
        sizes = []
        with self._saying("read"):
            for entry in self._entries(self._blocks):
                with contextlib.suppress(FileNotFoundError):  # somebody made room
                    sizes.append(entry.stat().st_size)
        return Usage(len(sizes), sum(sizes), self._budget_bytes)

    def flush(self) -> int:
        count = 0
        with self._saying("emptied"), self._ledger() as ledger:
            for entry in self._entries(self._blocks):
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(entry.path)  # noqa: PTH108
                    count += 1
            ledger.write(sum(size for _, size, _ in self._files()))
        return count

    def close(self) -> None:
        """Nothing is held."""

    def _make(self) -> None:
        """What is not there: somebody may clear /dev/shm at any time, as systemd does when a user logs out."""
        self._directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        link, status = self._directory.lstat(), self._directory.stat()
        if not link.st_uid == status.st_uid == os.getuid():
            raise StoreFailed(
                f"kv_cache.host_directory: {self.where} belongs to user {status.st_uid},"
                f" this process is of {os.getuid()}"
            )
        if status.st_mode & OTHERS_MAY_WRITE:
            raise StoreFailed(f"kv_cache.host_directory: others may write to {self.where}: chmod go-w {self.where}")
        self._blocks.mkdir(mode=0o700, exist_ok=True)

    def _file(self, name: bytes) -> str:
        return f"{self._blocks}/{name.hex()}{_BLOCK}"

    def _entries(self, folder: Path | str) -> Iterator[os.DirEntry[str]]:
        """Of whole blocks. What else is there is not ours to delete."""
        return (entry for entry in os.scandir(folder) if entry.name.endswith(_BLOCK))

    def _load(self, name: bytes) -> memoryview | None:
        file = self._file(name)
        try:
            with open(file, "rb", buffering=0) as stream:  # noqa: PTH123
                stored = bytearray(HEADER_BYTES + self._block_bytes + 1)
                size = stream.readinto(stored)
        except (FileNotFoundError, IsADirectoryError):
            return None
        except OSError as error:
            raise StoreFailed(f"kv_cache.host_directory: {file} cannot be read: {error.strerror}") from error
        block = unframed(memoryview(stored)[:size], name, self._block_bytes)
        if block is None:
            with contextlib.suppress(OSError):
                os.unlink(file)  # noqa: PTH108
        return block

    def _write(self, aside: str, name: bytes, block: memoryview) -> None:
        descriptor = os.open(aside, os.O_WRONLY)
        try:
            written = os.writev(descriptor, [header(name, block), block])
        finally:
            os.close(descriptor)
        if written != HEADER_BYTES + block.nbytes:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

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

    def _reserve(self, names: Sequence[bytes]) -> list[str]:
        """Files aside for as many of these as fit, deleting what was used longest ago.

        They have their full length at once, so that whoever counts meanwhile counts them, too. What is counted and then
        not written (its writer died, another wrote the same block) is found when room is made: then everything is
        counted anew.

        Raises:
            StoreFailed: there is no room for a single one.
        """
        size = HEADER_BYTES + self._block_bytes
        more = size * len(names)
        with self._ledger() as ledger:
            total, room = ledger.read(), self._budget_bytes
            if total is None or total + more > room or more > self._free():
                total, room = self._make_room(more)
            num_fit = min(len(names), max(0, room - total) // size)
            if not num_fit:
                raise StoreFailed(
                    f"kv_cache.host_bytes: a block of {size} bytes does not fit beside {total} in the {room} bytes that"
                    f" may be used of {self.where}"
                )
            mine = f"{self._blocks}/{_ASIDE}{os.getpid()}-{threading.get_ident()}"
            asides = [f"{mine}-{name.hex()}" for name in names[:num_fit]]
            for aside in asides:
                descriptor = os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
                os.ftruncate(descriptor, size)
                os.close(descriptor)
            ledger.write(total + size * num_fit)
        return asides

    def _free(self) -> int:
        """Bytes that may still be taken of the file system; below zero if there is less than is to be spared."""
        status = os.statvfs(self._directory)
        spare = min(SPARE_BYTES, int(SPARE_SHARE * status.f_blocks * status.f_frsize))
        return status.f_bavail * status.f_frsize - spare

    def _make_room(self, more: int) -> tuple[int, int]:
        """Delete until `more` bytes fit, and some beyond; bytes that remain, and how many there may be."""
        files = sorted(self._files())
        total = sum(size for _, size, _ in files)
        room = min(self._budget_bytes, total + self._free())
        if total + more <= room:
            return total, room
        wanted = max(0, room - more - int(MAKE_ROOM_SHARE * room))
        for _, size, path in files:
            if total <= wanted:
                break
            if path.endswith(_BLOCK):
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(path)  # noqa: PTH108
                total -= size
        return total, room

    @contextlib.contextmanager
    def _ledger(self) -> Iterator[_Ledger]:
        """What the directory holds, for one process of the node at a time."""
        self._make()
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
        """(last use, bytes, path) of every block of every namespace, written or aside; sweeps what lost its writer."""
        found = []
        for namespace in os.scandir(self._directory):
            if not namespace.is_dir(follow_symlinks=False):
                continue
            for entry in os.scandir(namespace.path):
                is_aside = entry.name.startswith(_ASIDE)
                if not (is_aside or entry.name.endswith(_BLOCK)):
                    continue  # not ours to delete
                with contextlib.suppress(FileNotFoundError):
                    status = entry.stat()
                    if is_aside and time() - status.st_mtime > STALE_S:
                        os.unlink(entry.path)  # noqa: PTH108
                        continue
                    found.append((status.st_mtime, status.st_size, entry.path))
        return found
