"""What tests of block stores share: blocks that anybody can make again, a look behind the store, writers to kill."""

from __future__ import annotations

import contextlib
import os
import random
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from redis import Redis

from moeray.kv_cache import BlockStore, NodeBlocks, RedisBlocks

BLOCK_BYTES = 5000
NAMESPACE = "0123456789abcdef01234567"
TIMEOUT_S = 30.0
"""Longer than any machine is slow; tests of time-outs have their own."""
AMPLE = 1 << 30
BATCH = 16


def names_of(count: int, first: int = 0) -> list[bytes]:
    """As vLLM's: a hash and the number of a cache group; any byte may be in them."""
    return [random.Random(index).randbytes(32) + bytes([0, 0, 0, index % 6]) for index in range(first, first + count)]


def block_of(name: bytes, num_bytes: int = BLOCK_BYTES) -> memoryview:
    """What belongs to this name."""
    return memoryview(random.Random(name).randbytes(num_bytes))


def blocks_of(names: Sequence[bytes], num_bytes: int = BLOCK_BYTES) -> list[memoryview]:
    return [block_of(name, num_bytes) for name in names]


def loaded(store: BlockStore, names: Sequence[bytes]) -> list[bytes | None]:
    return [None if block is None else bytes(block) for block in store.load(names)]


@dataclass(frozen=True)
class Place:
    """A kind of store and where it is; opens it, and looks behind it."""

    kind: str
    where: str

    def open(self, namespace: str = NAMESPACE, block_bytes: int = BLOCK_BYTES, budget_bytes: int = AMPLE) -> BlockStore:
        if self.kind == "node":
            return NodeBlocks(Path(self.where), namespace, block_bytes, budget_bytes)
        return RedisBlocks(self.where, None, namespace, block_bytes, ttl_s=3600, timeout_s=TIMEOUT_S)

    def read(self, name: bytes) -> bytes:
        if self.kind == "node":
            return self._file(name).read_bytes()
        with self._client() as client:
            value = client.get(self._key(name))
            assert isinstance(value, bytes)
            return value

    def write(self, name: bytes, stored: bytes) -> None:
        if self.kind == "node":
            self._file(name).write_bytes(stored)
            return
        with self._client() as client:
            client.set(self._key(name), stored)

    def put_something_else(self, name: bytes) -> None:
        """Not even of the right type."""
        if self.kind == "node":
            self._file(name).mkdir()
            return
        with self._client() as client:
            client.rpush(self._key(name), b"foreign")

    def _file(self, name: bytes) -> Path:
        return Path(self.where) / NAMESPACE / f"{name.hex()}.kv"

    def _key(self, name: bytes) -> bytes:
        return f"moeray-kv:{NAMESPACE}:".encode() + name

    def _client(self) -> Redis:
        return Redis.from_url(self.where)


@contextlib.contextmanager
def writer(place: Place, *, first: int, block_bytes: int, budget_bytes: int = AMPLE) -> Iterator[subprocess.Popen[str]]:
    """A process that stores blocks, BATCH by BATCH, until it is killed; it is yielded once it has stored the first."""
    command = [sys.executable, __file__, place.kind, place.where, str(first), str(block_bytes), str(budget_bytes)]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "stored\n"
        yield process
    finally:
        process.kill()
        process.wait()


def _write_for_ever(place: Place, first: int, block_bytes: int, budget_bytes: int) -> None:
    store = place.open(block_bytes=block_bytes, budget_bytes=budget_bytes)
    while True:
        names = names_of(BATCH, first)
        for name, block in list(zip(names, blocks_of(names, block_bytes), strict=True)):
            store.store([name], [block])
        print("stored", flush=True)
        first += BATCH


if __name__ == "__main__":
    kind, where, *numbers = sys.argv[1:]
    _write_for_ever(Place(kind, where), *map(int, numbers))
