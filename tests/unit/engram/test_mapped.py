"""Tables as maps of files: one copy in a node's memory, brought there before anybody waits for it."""

from __future__ import annotations

import ctypes
import mmap
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from moeray.engram import FileRange, LocalTables, StoredRows, Table, mapped, prefault

ROWS, ROW_BYTES = 40_000, 1024
TABLE_KIB = ROWS * ROW_BYTES // 1024

READER = """
import sys
import numpy as np
from moeray.engram import LocalTables, Table
values = np.asarray(np.memmap(sys.argv[1], np.uint8, mode="r", shape=(int(sys.argv[2]), int(sys.argv[3]))))
tables = LocalTables([Table(values, None)])
rows = tables.ask(np.arange(int(sys.argv[2])).reshape(1, 1, -1)).take(0)
print(int(rows.values[rows.index_TC[0]].sum(dtype=np.int64)), flush=True)
sys.stdin.read()
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "table"
    np.random.default_rng(0).integers(0, 256, ROWS * ROW_BYTES, dtype=np.uint8).tofile(path)
    return path


def kib_of(pid: int, file: Path) -> dict[str, int]:
    """Rss, Pss and private memory of one process' map of a file."""
    found, ours = dict.fromkeys(("Rss", "Pss", "Anonymous"), 0), False
    for line in Path(f"/proc/{pid}/smaps").read_text(encoding="utf-8").splitlines():
        first = line.split()[0]
        if not first.endswith(":"):
            ours = line.endswith(str(file))
        elif ours and first[:-1] in found:
            found[first[:-1]] += int(line.split()[1])
    return found


def test_prefetched_rows_are_read_and_no_others(file: Path) -> None:
    values = np.asarray(np.memmap(file, np.uint8, mode="r", shape=(ROWS, ROW_BYTES)))
    tables = LocalTables([Table(values, None)])
    before = kib_of(os.getpid(), file)["Rss"]
    tables.prefetch(np.arange(ROWS // 2).reshape(1, 1, -1))
    read = kib_of(os.getpid(), file)["Rss"]
    assert before < TABLE_KIB / 10 and TABLE_KIB / 2 <= read < TABLE_KIB * 0.6
    tables.prefetch(np.arange(ROWS).reshape(1, -1, 1))
    assert kib_of(os.getpid(), file)["Rss"] >= TABLE_KIB


def test_two_processes_hold_one_copy(file: Path) -> None:
    command = [sys.executable, "-c", READER, str(file), str(ROWS), str(ROW_BYTES)]
    readers = [subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) for _ in range(2)]
    try:
        sums = [int(reader.stdout.readline()) for reader in readers if reader.stdout is not None]
        assert sums == [int(np.fromfile(file, np.uint8).sum(dtype=np.int64))] * 2
        for reader in readers:
            memory = kib_of(reader.pid, file)
            assert memory["Rss"] >= TABLE_KIB and memory["Anonymous"] == 0
            assert memory["Pss"] == pytest.approx(TABLE_KIB / 2, rel=0.05)
    finally:
        for reader in readers:
            reader.communicate(timeout=30)


def resident_pages(file: Path) -> int:
    """Of the file, in the node's memory: mincore by way of what a fresh map finds without reading."""
    with file.open("rb") as stream, mmap.mmap(stream.fileno(), 0, prot=mmap.PROT_READ) as found:
        pages = -(-len(found) // mmap.PAGESIZE)
        told = (ctypes.c_ubyte * pages)()
        address = np.frombuffer(found, np.uint8).ctypes.data
        libc = ctypes.CDLL(None, use_errno=True)
        assert libc.mincore(ctypes.c_void_p(address), ctypes.c_size_t(len(found)), told) == 0
        return sum(each & 1 for each in told)


@pytest.mark.parametrize("offset", [0, 12_345])
def test_prefault_brings_every_page_and_tells_how_far_it_is(
    file: Path, offset: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mapped, "SLICE_BYTES", 8 << 20)
    size = file.stat().st_size - offset
    descriptor = os.open(file, os.O_RDONLY)
    os.fsync(descriptor)
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(descriptor)
    told: list[tuple[int, int]] = []
    prefault([FileRange(file, offset, size)], lambda *each: told.append(each))
    assert resident_pages(file) >= size // mmap.PAGESIZE
    steps = [done for done, _ in told]
    assert steps == sorted(set(steps)) and told[-1] == (size, size) and len(told) >= 5


def test_a_kernel_without_populate_touches_the_pages(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mapped, "_POPULATE_READ", 9999)
    told: list[int] = []
    prefault([FileRange(file, 0, file.stat().st_size)], lambda done, _: told.append(done))
    assert told[-1] == file.stat().st_size and resident_pages(file) == told[-1] // mmap.PAGESIZE


def test_a_file_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        prefault([FileRange(tmp_path / "none", 0, 1)], lambda *_: None)


def test_a_copy_has_the_same_rows_and_is_nobody_elses() -> None:
    values = np.arange(12, dtype=np.uint8).reshape(4, 3)
    values.setflags(write=False)
    table = Table(values, None)
    copied = table.copied()
    assert np.array_equal(copied.values, values) and not np.shares_memory(copied.values, values)
    rows: StoredRows = LocalTables([copied]).ask(np.array([[[2, 0]]])).take(0)
    assert rows.values[rows.index_TC].tolist() == [[[6, 7, 8], [0, 1, 2]]]
