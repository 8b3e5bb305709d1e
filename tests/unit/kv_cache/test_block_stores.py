"""What every store of KV blocks keeps to: one suite over the node's memory and a real Redis."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from kv_stores import BATCH, BLOCK_BYTES, Place, block_of, blocks_of, loaded, names_of, writer

from moeray.kv_cache.frame import HEADER_BYTES

LARGE = 4 << 20
FOREIGN = "76543210fedcba9876543210"


@pytest.fixture(params=["node", "redis"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Place:
    if request.param == "node":
        return Place("node", str(tmp_path / "kv"))
    request.getfixturevalue("redis")
    return Place("redis", request.getfixturevalue("redis_server").url)


def test_blocks_come_back_bit_for_bit_in_the_order_asked(place: Place) -> None:
    store, names = place.open(), names_of(50)
    assert store.has(names) == [False] * 50
    assert store.store(names[:40], blocks_of(names[:40])) == 40
    asked = random.Random(1).sample(names, 50)
    assert store.has(asked) == [name in names[:40] for name in asked]
    assert loaded(store, asked) == [bytes(block_of(name)) if name in names[:40] else None for name in asked]


def test_nothing_is_asked_for_and_nothing_stored_without_harm(place: Place) -> None:
    store = place.open()
    assert (store.has([]), loaded(store, []), store.store([], [])) == ([], [], 0)
    store.touch([])
    assert store.flush() == 0


def test_who_stores_first_has_stored_for_all(place: Place) -> None:
    ours, theirs, names = place.open(), place.open(), names_of(3)
    assert ours.store(names[:2], blocks_of(names[:2])) == 2
    assert theirs.store(names, blocks_of(names)) == 1
    assert theirs.store([names[0], names[0]], [block_of(b"other")] * 2) == 0
    assert loaded(theirs, names) == [bytes(block) for block in blocks_of(names)]


def test_a_name_twice_in_one_call_is_one_block(place: Place) -> None:
    store, (name,) = place.open(), names_of(1)
    assert store.store([name, name], [block_of(name)] * 2) == 1
    assert loaded(store, [name, name]) == [bytes(block_of(name))] * 2


def test_processes_share_blocks(place: Place) -> None:
    store, names = place.open(), names_of(8)
    with writer(place, first=0, block_bytes=BLOCK_BYTES) as process:
        assert process.stdout is not None
        process.stdout.readline()
        assert loaded(store, names) == [bytes(block) for block in blocks_of(names)]


def test_a_writer_that_is_killed_leaves_nothing_half(place: Place) -> None:
    """Killed at any instant, most of them in the middle of a block: what is there then is whole."""
    reader, random_ = place.open(block_bytes=LARGE), random.Random(2)
    for again in range(6):
        with writer(place, first=again * BATCH, block_bytes=LARGE) as process:
            reader.flush()
            while not reader.usage().blocks:  # it makes the next batch
                time.sleep(0.001)
            time.sleep(random_.uniform(0, 0.02))
            process.kill()
            process.wait()
        names = names_of(BATCH, (again + 1) * BATCH)
        there = reader.has(names)
        assert any(there)
        whole = [
            bytes(block_of(name, LARGE)) if is_there else None for name, is_there in zip(names, there, strict=True)
        ]
        assert loaded(reader, names) == whole


def test_threads_share_one_store(place: Place) -> None:
    store, names = place.open(), names_of(60)

    def work(seed: int) -> bool:
        mine = random.Random(seed).sample(names, 40)
        store.store(mine, blocks_of(mine))
        store.touch(mine)
        return loaded(store, mine) == [bytes(block) for block in blocks_of(mine)] and all(store.has(mine))

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(work, range(16)))


def test_other_namespaces_are_neither_seen_nor_counted_nor_flushed(place: Place) -> None:
    ours, theirs, names = place.open(), place.open(namespace=FOREIGN), names_of(5)
    theirs.store(names, [block_of(b"theirs")] * 5)
    assert (ours.has(names), loaded(ours, names)) == ([False] * 5, [None] * 5)
    assert ours.usage().blocks == 0
    ours.store(names[:2], blocks_of(names[:2]))
    assert (ours.usage().blocks, ours.usage().bytes) == (2, 2 * (HEADER_BYTES + BLOCK_BYTES))
    assert ours.flush() == 2
    assert ours.has(names) == [False] * 5
    assert loaded(theirs, names) == [bytes(block_of(b"theirs"))] * 5


def test_blocks_of_another_size_are_not_there(place: Place) -> None:
    names = names_of(2)
    place.open(block_bytes=BLOCK_BYTES + 1).store(names, blocks_of(names, BLOCK_BYTES + 1))
    assert loaded(place.open(), names) == [None, None]


def _flip(position: int) -> Callable[[bytes], bytes]:
    def flipped(stored: bytes) -> bytes:
        changed = bytearray(stored)
        changed[position] ^= 1 << random.Random(position).randrange(8)
        return bytes(changed)

    return flipped


DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "a bit of the magic": _flip(0),
    "a bit of the length": _flip(5),
    "a bit of the checksum": _flip(9),
    "the first bit": _flip(HEADER_BYTES),
    "a bit in the middle": _flip(HEADER_BYTES + BLOCK_BYTES // 2),
    "the last bit": _flip(-1),
    "two pages changed places": lambda stored: stored[:1000] + stored[2000:3000] + stored[1000:2000] + stored[3000:],
    "cut by a byte": lambda stored: stored[:-1],
    "cut in the header": lambda stored: stored[:7],
    "nothing left": lambda stored: b"",
    "zeros": lambda stored: bytes(len(stored)),
    "a byte more": lambda stored: stored + b"\0",
    "another version's": lambda stored: b"MKV2" + stored[4:],
    "without a header": lambda stored: stored[HEADER_BYTES:],
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_block_is_one_that_is_not_there_and_can_be_stored_again(place: Place, damage: str) -> None:
    store, names = place.open(), names_of(3)
    store.store(names, blocks_of(names))
    place.write(names[1], DAMAGES[damage](place.read(names[1])))
    whole = [bytes(block) for block in blocks_of(names)]
    assert loaded(store, names) == [whole[0], None, whole[2]]
    assert store.has(names) == [True, False, True]
    assert store.store(names, blocks_of(names)) == 1
    assert loaded(store, names) == whole


def test_a_whole_block_under_anothers_name_is_not_there(place: Place) -> None:
    store, names = place.open(), names_of(2)
    store.store(names, blocks_of(names))
    place.write(names[1], place.read(names[0]))
    assert loaded(store, names) == [bytes(block_of(names[0])), None]


def test_something_else_under_a_name_is_no_block(place: Place) -> None:
    store, names = place.open(), names_of(3)
    store.store([names[0], names[2]], blocks_of([names[0], names[2]]))
    place.put_something_else(names[1])
    assert loaded(store, names) == [bytes(block_of(names[0])), None, bytes(block_of(names[2]))]


def test_blocks_that_go_between_asking_and_loading_are_misses(place: Place) -> None:
    ours, theirs, names = place.open(), place.open(), names_of(6)
    ours.store(names, blocks_of(names))
    assert all(ours.has(names))
    coming = ours.load(names)
    assert next(coming) is not None
    assert theirs.flush() == 6
    assert set(coming) <= {None} | set(map(bytes, blocks_of(names)))
    assert loaded(ours, names) == [None] * 6
    ours.touch(names)
    assert ours.has(names) == [False] * 6
    assert ours.store(names, blocks_of(names)) == 6


def test_a_store_may_be_closed_twice(place: Place) -> None:
    store, names = place.open(), names_of(1)
    store.store(names, blocks_of(names))
    store.close()
    store.close()
    assert place.open().has(names) == [True]
