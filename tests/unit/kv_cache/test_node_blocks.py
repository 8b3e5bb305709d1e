"""What only a directory has: a budget that processes share, a file system that fills up, other users."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
from kv_stores import BLOCK_BYTES, NAMESPACE, Place, block_of, blocks_of, loaded, names_of, writer

from moeray.kv_cache import NodeBlocks, StoreFailed
from moeray.kv_cache import node_blocks as module
from moeray.kv_cache.frame import HEADER_BYTES

FILE_BYTES = HEADER_BYTES + BLOCK_BYTES
WAIT_S = 60.0


def opened(directory: Path, num_blocks: int = 100, namespace: str = NAMESPACE) -> NodeBlocks:
    """With a budget of so many blocks."""
    return NodeBlocks(directory, namespace, BLOCK_BYTES, num_blocks * FILE_BYTES)


@contextmanager
def counted(directory: Path) -> Iterator[dict[str, int]]:
    """Bytes of each block that is there or on its way, while nobody may make room."""
    with (directory / ".total").open("r+b") as ledger:
        fcntl.flock(ledger, fcntl.LOCK_EX)
        files = [file for folder in directory.iterdir() if folder.is_dir() for file in folder.iterdir()]
        sizes = {}
        for file in files:
            try:
                sizes[file.name.removesuffix(".kv").rpartition("-")[2]] = file.stat().st_size
            except FileNotFoundError:  # it was aside, and is under its name now
                sizes[file.name.rpartition("-")[2]] = FILE_BYTES
        yield sizes


def test_the_budget_holds_at_every_instant_while_processes_write(tmp_path: Path) -> None:
    num_blocks = 50
    place, budget = Place("node", str(tmp_path)), num_blocks * FILE_BYTES
    with ExitStack() as stack:
        writers = [
            stack.enter_context(writer(place, first=10_000 * each, block_bytes=BLOCK_BYTES, budget_bytes=budget))
            for each in range(3)
        ]
        most = 0
        for _ in range(300):
            with counted(tmp_path) as sizes:
                most = max(most, sum(sizes.values()))
            time.sleep(0.002)
        assert all(process.poll() is None for process in writers)
    assert budget * 0.8 <= most <= budget


def test_what_was_used_longest_ago_goes_first_whatever_its_namespace(tmp_path: Path) -> None:
    store, other, names = opened(tmp_path, 20), opened(tmp_path, 20, "f" * 24), names_of(30)
    for first in range(0, 16, 4):
        (other if first == 4 else store).store(names[first : first + 4], blocks_of(names[first : first + 4]))
        time.sleep(0.02)
    store.touch(names[:4])
    store.store(names[16:23], blocks_of(names[16:23]))  # five too many, and a tenth of the budget at once
    assert store.has(names[:4]) == [True] * 4
    assert other.has(names[4:8]) == [False] * 4
    assert store.has(names[16:23]) == [True] * 7
    assert sum(store.has(names[8:16])) == 7


def test_more_than_the_budget_at_once_keeps_what_fits(tmp_path: Path) -> None:
    store, names = opened(tmp_path, 7), names_of(20)
    assert store.store(names, blocks_of(names)) == 7
    assert store.usage().bytes <= 7 * FILE_BYTES
    assert sum(block is not None for block in loaded(store, names)) == 7


def test_a_budget_below_one_block_is_said_by_name(tmp_path: Path) -> None:
    store, names = NodeBlocks(tmp_path, NAMESPACE, BLOCK_BYTES, FILE_BYTES - 1), names_of(1)
    with pytest.raises(StoreFailed, match=rf"kv_cache\.host_bytes: a block of {FILE_BYTES} bytes does not fit"):
        store.store(names, blocks_of(names))
    assert store.has(names) == [False]


def test_what_a_dead_writer_had_begun_is_swept_and_what_a_living_one_has_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, names = opened(tmp_path, 5), names_of(20)
    old, new = (tmp_path / NAMESPACE / f".new-1-1-{index}" for index in range(2))
    for file in (old, new):
        file.write_bytes(bytes(FILE_BYTES))
    os.utime(old, (time.time() - module.STALE_S - 1,) * 2)
    for first in range(0, 20, 4):
        store.store(names[first : first + 4], blocks_of(names[first : first + 4]))
    assert not old.exists() and new.exists()
    assert store.usage().blocks <= 4


def test_what_is_not_ours_is_never_deleted(tmp_path: Path) -> None:
    """Somebody may name a directory that has other things in it."""
    (tmp_path / "letters").mkdir()
    (letter := tmp_path / "letters" / "dear.txt").write_text("x" * FILE_BYTES)
    store, names = opened(tmp_path, 5), names_of(20)
    for first in range(0, 20, 5):
        store.store(names[first : first + 5], blocks_of(names[first : first + 5]))
    (beside := tmp_path / NAMESPACE / "beside.txt").write_text("")
    store.flush()
    assert letter.exists() and beside.exists()


def test_a_ledger_that_lies_is_found_out(tmp_path: Path) -> None:
    store, names = opened(tmp_path, 20), names_of(30)
    store.store(names[:10], blocks_of(names[:10]))
    for lie in (b"9" * 20, b"", b"-000000000000000001", b"nonsense"):
        (tmp_path / ".total").write_bytes(lie)
        store.store([names[10]], [block_of(names[10])])
        assert all(store.has(names[:11]))
        assert int((tmp_path / ".total").read_text()) == 11 * FILE_BYTES
        (tmp_path / NAMESPACE / f"{names[10].hex()}.kv").unlink()


def test_a_directory_that_is_cleared_meanwhile_is_made_again(tmp_path: Path) -> None:
    """systemd clears what a user has in /dev/shm when he logs out."""
    import shutil

    store, names = opened(tmp_path / "kv"), names_of(3)
    store.store(names, blocks_of(names))
    shutil.rmtree(tmp_path / "kv")
    assert loaded(store, names) == [None] * 3
    assert store.store(names, blocks_of(names)) == 3
    assert loaded(store, names) == [bytes(block) for block in blocks_of(names)]


def of_another_user(tmp_path: Path) -> Path:
    if os.getuid():
        return Path("/dev/shm")
    (directory := tmp_path / "theirs").mkdir()
    os.chown(directory, 12345, 12345)
    return directory


def test_the_directory_of_another_user_is_refused(tmp_path: Path) -> None:
    directory = of_another_user(tmp_path)
    with pytest.raises(StoreFailed, match=r"kv_cache\.host_directory: .* belongs to user \d+, this process is of"):
        opened(directory)
    assert not (directory / NAMESPACE).exists()


def test_a_directory_that_others_may_write_to_is_refused(tmp_path: Path) -> None:
    tmp_path.chmod(0o777)
    with pytest.raises(StoreFailed, match=r"others may write to .*: chmod go-w"):
        opened(tmp_path)


def test_a_directory_that_is_made_is_closed_to_others(tmp_path: Path) -> None:
    store, names = opened(tmp_path / "a" / "kv"), names_of(1)
    store.store(names, blocks_of(names))
    assert all(not path.stat().st_mode & 0o077 for path in [tmp_path / "a" / "kv", *(tmp_path / "a/kv").rglob("*")])


def test_a_file_where_the_directory_should_be_is_an_error_of_ours(tmp_path: Path) -> None:
    (tmp_path / "kv").write_text("")
    with pytest.raises(StoreFailed, match=r"kv_cache\.host_directory: .*/kv cannot be made: File exists"):
        opened(tmp_path / "kv")


def test_a_process_that_is_stopped_while_it_makes_room_holds_up_nobody_who_loads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "LOCK_S", 0.2)
    store, names = opened(tmp_path), names_of(4)
    store.store(names[:2], blocks_of(names[:2]))
    holder = subprocess.Popen(
        ["flock", "--no-fork", str(tmp_path / ".total"), "sh", "-c", "echo; exec sleep 600"], stdout=-1
    )
    try:
        assert holder.stdout is not None
        holder.stdout.read(1)
        os.kill(holder.pid, signal.SIGSTOP)
        began = time.monotonic()
        with pytest.raises(StoreFailed, match="is locked by a hung process"):
            store.store(names[2:], blocks_of(names[2:]))
        assert time.monotonic() - began < WAIT_S
        assert loaded(store, names) == [*map(bytes, blocks_of(names[:2])), None, None]
        assert store.usage().blocks == 2
    finally:
        holder.kill()
        holder.wait(WAIT_S)
    assert store.store(names[2:], blocks_of(names[2:])) == 2


def test_readers_and_those_who_count_survive_those_who_make_room(tmp_path: Path) -> None:
    """What goes while it is read is a miss, never an error."""
    store, names = opened(tmp_path, 12), names_of(200)
    stop = threading.Event()
    failures: list[Exception] = []

    def watch(look: Callable[[], object]) -> None:
        while not stop.is_set():
            try:
                look()
            except Exception as error:  # noqa: BLE001  whatever it is, it is told
                failures.append(error)

    def look_at_blocks() -> None:
        found = loaded(store, names)
        assert all(found[i] in (None, bytes(block_of(name))) for i, name in enumerate(names) if found[i] is not None)

    threads = [threading.Thread(target=watch, args=(look,)) for look in (look_at_blocks, store.usage)]
    for thread in threads:
        thread.start()
    blocks = blocks_of(names)
    for _ in range(3):
        for first in range(0, 200, 4):
            store.store(names[first : first + 4], blocks[first : first + 4])
    stop.set()
    for thread in threads:
        thread.join(WAIT_S)
    assert not failures


def on_a_tiny_file_system(directory: str) -> None:
    """In a process of its own; what came of it goes to stdout."""
    path, told = Path(directory), {}
    store, names = opened(path / "kv", 10_000), names_of(2000)
    told["stored"] = sum(store.store(names[i : i + 10], blocks_of(names[i : i + 10])) for i in range(0, 1000, 10))
    whole = [block is not None for block in store.load(names[:1000])]
    told |= {"kept": sum(whole), "last": all(whole[-10:]), "free": os.statvfs(path).f_bavail * os.statvfs(path).f_bsize}
    try:
        with (path / "somebody elses").open("wb", buffering=0) as filler:
            while filler.write(bytes(4096)):
                pass
    except OSError as error:
        told["filled"] = error.strerror
    try:
        store.store(names[1000:1010], blocks_of(names[1000:1010]))
        for file in (path / "kv" / NAMESPACE).iterdir():
            file.unlink()
        (path / "somebody elses more").write_bytes(bytes(1 << 24))
    except (StoreFailed, OSError) as error:
        told["yields"] = str(error)
    told["aside"] = len(list(path.rglob(".new-*")))
    try:
        store.store(names[1010:1020], blocks_of(names[1010:1020]))
    except StoreFailed as error:
        told["full"] = str(error)
    there = store.has(names)
    told["half"] = sum((block is None) == is_there for is_there, block in zip(there, store.load(names), strict=True))
    for file in path.glob("somebody*"):
        file.unlink()
    told["again"] = store.store(names[1020:1030], blocks_of(names[1020:1030]))
    print(json.dumps(told))


def test_a_file_system_smaller_than_the_budget_is_the_budget(tmp_path: Path) -> None:
    mount = f'mount -t tmpfs -o size=2m tmpfs {tmp_path} && chmod 700 {tmp_path} && exec "$@"'
    prefix = ["unshare", "--mount", "--propagation", "private", "sh", "-c", mount, "sh"]
    if subprocess.run([*prefix, "true"], capture_output=True, check=False).returncode:
        pytest.skip("no file system can be mounted here")
    run = subprocess.run(
        [*prefix, sys.executable, __file__, str(tmp_path)], capture_output=True, text=True, timeout=WAIT_S,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    told = json.loads(run.stdout)
    assert told["stored"] == 1000 and told["last"]
    assert 0 < told["kept"] < 1000 and told["free"] >= 0.05 * (2 << 20) - 4096
    assert told["filled"] == "No space left on device"
    assert "kv_cache.host_bytes" in told["full"] and told["aside"] == told["half"] == 0
    assert told["again"] == 10


if __name__ == "__main__":
    on_a_tiny_file_system(sys.argv[1])
