"""Whether compressing KV blocks pays: an engine's own blocks, through zlib and through a Redis on loopback.

    python benchmarks/kv_compression.py [--json FILE]

It pays where compressing and moving less takes less time than moving all.
"""

from __future__ import annotations

import argparse
import multiprocessing
import sys
import tempfile
import time
import zlib
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from kv_engines import KvEngine
from records import ROOT, write

from moeray.config import KvCacheConfig
from moeray.kv_cache import RedisBlocks
from moeray.kv_cache.frame import HEADER_BYTES
from moeray.tiny import checkpoint_path

sys.path.append(str(ROOT / "tests"))
from redis_server import RedisServer, missing

NUM_PROMPTS, PROMPT_TOKENS, NUM_GENERATED = 4, 2048, 16
REPEATS = 5
LEVEL = 1
MIB = 1 << 20


def blocks_of_an_engine(directory: Path) -> None:
    """Serve a few prompts; their KV is in files of `directory` afterwards. In a process of its own."""
    engine = KvEngine()
    kv_cache = KvCacheConfig(host_directory=str(directory), staging_bytes=32 << 20)
    engine.start(checkpoint_path(), asdict(kv_cache))
    for seed in range(NUM_PROMPTS):
        engine.ask(np.random.default_rng(seed).integers(10, 1500, PROMPT_TOKENS).tolist(), NUM_GENERATED)
    engine.settle()


def mib_per_s(num_bytes: int, work: Callable[[], object]) -> float:
    """The best of some: what the machine can do."""
    best = float("inf")
    for _ in range(REPEATS):
        began = time.perf_counter()
        work()
        best = min(best, time.perf_counter() - began)
    return num_bytes / MIB / best


def compared(blocks: Sequence[bytes], redis_url: str) -> dict[str, Any]:
    """Ratios of size, and MiB of uncompressed blocks per second."""
    total = sum(map(len, blocks))
    packed = [zlib.compress(block, LEVEL) for block in blocks]
    store = RedisBlocks(redis_url, None, "0" * 24, len(blocks[0]), ttl_s=3600, timeout_s=30.0)
    names, views = [index.to_bytes(36, "big") for index in range(len(blocks))], [memoryview(block) for block in blocks]

    def stored() -> None:
        store.flush()
        store.store(names, views)

    store_mib_s = mib_per_s(total, stored)
    return {
        "blocks": len(blocks), "block_bytes": len(blocks[0]), "zero_share": _zero_share(blocks),
        "zlib_size": sum(map(len, packed)) / total,
        "zlib_compress_mib_s": mib_per_s(total, lambda: [zlib.compress(block, LEVEL) for block in blocks]),
        "zlib_decompress_mib_s": mib_per_s(total, lambda: [zlib.decompress(block) for block in packed]),
        "redis_store_mib_s": store_mib_s,
        "redis_load_mib_s": mib_per_s(total, lambda: list(store.load(names))),
    }  # fmt: skip


def pays_below_mib_s(size: float, work_mib_s: float) -> float:
    """The bandwidth of a store below which (1 - size) of the bytes take longer to move than the work takes."""
    return (1 - size) * work_mib_s


def _zero_share(blocks: Sequence[bytes]) -> float:
    return float(np.mean([np.mean(np.frombuffer(block, np.uint8) == 0) for block in blocks]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    told = parser.parse_args()
    if (why := missing()) is not None:
        raise SystemExit(f"a Redis is needed: {why}")
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        engine = multiprocessing.get_context("spawn").Process(target=blocks_of_an_engine, args=(Path(folder) / "kv",))
        engine.start()
        engine.join()
        files = sorted((Path(folder) / "kv").glob("*/*.kv"))
        blocks = [file.read_bytes()[HEADER_BYTES:] for file in files]
        server = RedisServer(Path(folder), appendonly="no")
        server.start()
        try:
            found = compared(blocks, server.url)
        finally:
            server.kill()
    for way in ("compress", "decompress"):
        found[f"{way}_pays_below_mib_s"] = pays_below_mib_s(found["zlib_size"], found[f"zlib_{way}_mib_s"])
    for name, value in found.items():
        print(f"{name:28} {value:10.3f}" if isinstance(value, float) else f"{name:28} {value:10}")
    if told.json:
        write(told.json, [found])


if __name__ == "__main__":
    main()
