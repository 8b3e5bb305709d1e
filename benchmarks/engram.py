"""Engram tables in host memory: what mapping costs, beside a table in private memory and beside a plain copy.

    python benchmarks/engram.py [--quick] [--json FILE]

decode: tokens per second of an engine of the bundled model whose tables are mapped (`host`), beside one that has them
in memory of its own (`device`), in turn on one core; `ratio` within a pair, above 1 the mapped one is faster.

gather: rows per second of a generated table of random bytes, rows of 256 FP8 values and 8 scales as DeepSeek-V4.1 has
them, 48 rows a token at random: out of the mapped file, out of private memory, and the floor: copying as many bytes in
one piece. `us_per_token` includes turning FP8 into bf16.

memory: two processes that read every row of the same file: RSS and PSS of their maps, and what is private.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import records
from kv_engines import KvEngine
from pinned import Process, pin, two_cores

from moeray.deepseek_v4.engram_kernel import gather_fp8, products
from moeray.engram import FileRange, Table, prefault
from moeray.tiny import checkpoint_path

WIDTH, BLOCKS, ROWS_PER_TOKEN = 256, 8, 48
ROW_BYTES = WIDTH + BLOCKS
STEP_TOKENS = (1, 16, 512)
GIB = 1 << 30
COST = 0.03
"""Target: what mapping may cost of decode throughput."""


@dataclass(frozen=True)
class Effort:
    """Size of the table in private memory too, of the large one, and how often things are done."""

    table_bytes: int
    large_bytes: int
    pairs: int
    decode_steps: int
    repeats: int


QUICK = Effort(1 * GIB, 8 * GIB, pairs=8, decode_steps=60, repeats=40)
THOROUGH = Effort(4 * GIB, 8 * GIB, pairs=24, decode_steps=120, repeats=200)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a smaller table and fewer repeats (under three minutes)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the records there, facts beside it")
    parser.add_argument("--directory", type=Path, default=Path.cwd(), help="for the tables (9 GiB); a disk, not memory")
    options = parser.parse_args()
    effort = QUICK if options.quick else THOROUGH
    core, _ = two_cores()
    found = decoding(core, effort)
    pin([core])
    with tempfile.TemporaryDirectory(dir=options.directory) as folder:
        for num_bytes, is_large in ((effort.table_bytes, False), (effort.large_bytes, True)):
            file = Path(folder) / "table"
            generate(file, num_bytes)
            found += gathering(file, num_bytes, effort, with_copy=not is_large)
            if is_large:
                found += memory_of(file)
            file.unlink()
    if options.json:
        records.write(options.json, found, **asdict(effort))


def decoding(core: int, effort: Effort) -> list[records.Record]:
    engines = [Process(KvEngine, [core]) for _ in range(2)]
    found: list[records.Record] = []
    try:
        for engine, placement in zip(engines, ("host", "device"), strict=True):
            engine.ask("start", checkpoint_path(), None, False, placement)
            engine.ask("decode", 2, 20)
        for batch in (1, 8):
            pairs = []
            for number in range(effort.pairs):
                turns = engines if number % 2 else engines[::-1]
                speeds = {engine: engine.ask("decode", batch, effort.decode_steps) for engine in turns}
                pairs.append([speeds[engine] for engine in engines])
            ratios = [mapped / private for mapped, private in pairs]
            speed = round(statistics.median(mapped for mapped, _ in pairs))
            found.append({"bench": "decode", "batch": batch, "tokens_per_s": speed, **records.spread(ratios)})
            verdict = "met" if statistics.median(ratios) >= 1 - COST else "missed"
            print(
                f"decode, batch {batch}: mapped / private {spread(found[-1])}: target {1 - COST} {verdict}", flush=True
            )
    finally:
        for engine in engines:
            engine.end()
    return found


def spread(record: records.Record) -> str:
    return f"{record['ratio']:.3f} ({record['ratio_min']:.3f}..{record['ratio_max']:.3f})"


def generate(file: Path, num_bytes: int) -> None:
    """Random bytes, values first, then scales around 1."""
    random, rows = np.random.default_rng(0), num_bytes // ROW_BYTES
    with file.open("wb") as stream:
        for part, low, high in ((rows * WIDTH, 0, 256), (rows * BLOCKS, 120, 134)):
            while part:
                piece = random.integers(low, high, min(part, 64 << 20), dtype=np.uint8)
                stream.write(memoryview(piece))
                part -= len(piece)
    print(f"generated a table of {num_bytes / GIB:.0f} GiB", flush=True)


def table_of(file: Path, rows: int) -> Table:
    whole = np.memmap(file, np.uint8, mode="r")
    values = np.asarray(whole[: rows * WIDTH]).reshape(rows, WIDTH)
    return Table(values, np.asarray(whole[rows * WIDTH : rows * ROW_BYTES]).reshape(rows, BLOCKS))


def gathering(file: Path, num_bytes: int, effort: Effort, *, with_copy: bool) -> list[records.Record]:
    rows = num_bytes // ROW_BYTES
    began = time.perf_counter()
    prefault([FileRange(file, 0, rows * ROW_BYTES)], lambda *_: None)
    prefault_s = time.perf_counter() - began
    mapped = table_of(file, rows)
    tables = {"mapped": mapped, **({"private": mapped.copied()} if with_copy else {})}
    found: list[records.Record] = []
    for tokens in STEP_TOKENS:
        seconds = gather_in_turn(tables, rows, tokens * ROWS_PER_TOKEN, effort.repeats)
        of_map = statistics.median(seconds["mapped"])
        record: records.Record = {
            "bench": "gather",
            "table_gib": round(num_bytes / GIB, 1),
            "tokens": tokens,
            "rows_per_s": round(tokens * ROWS_PER_TOKEN / of_map),
            "us_per_token": round(1e6 * of_map / tokens, 2),
            "times_memcpy": round(of_map / statistics.median(seconds["memcpy"]), 1),
            "prefault_gib_per_s": round(num_bytes / GIB / prefault_s, 2),
        }
        beside = ""
        if with_copy:
            pairs = zip(seconds["private"], seconds["mapped"], strict=True)
            record |= records.spread([private / mapped for private, mapped in pairs])
            beside = f", mapped / private speed {spread(record)}"
        found.append(record)
        print(
            f"gather, {record['table_gib']} GiB, {tokens} tokens: {record['rows_per_s'] / 1e6:.2f} M rows/s, "
            f"{record['us_per_token']} us per token, {record['times_memcpy']} x memcpy{beside}",
            flush=True,
        )
    return found


def gather_in_turn(tables: dict[str, Table], rows: int, count: int, repeats: int) -> dict[str, list[float]]:
    """Seconds of each gather of `count` rows at random, and of copying as many bytes."""
    random = np.random.default_rng(1)
    out, flat = np.empty((count, WIDTH), np.uint16), np.empty(count * ROW_BYTES, np.uint8)
    source = random.integers(0, 256, count * ROW_BYTES, dtype=np.uint8)
    gather = gather_fp8()
    seconds: dict[str, list[float]] = {name: [] for name in (*tables, "memcpy")}
    for _ in range(repeats):
        index = random.integers(0, rows, count)
        for name, table in tables.items():
            began = time.perf_counter()
            gather(table.values, table.scales, index, products(), out)
            seconds[name].append(time.perf_counter() - began)
        began = time.perf_counter()
        np.copyto(flat, source)
        seconds["memcpy"].append(time.perf_counter() - began)
    return seconds


READER = """
import sys
import numpy as np
table = np.memmap(sys.argv[1], np.uint8, mode="r")
print(int(table[::4096].sum(dtype=np.int64)), flush=True)
sys.stdin.read()
"""


def memory_of(file: Path) -> list[records.Record]:
    """Of two processes that have touched every page of the file."""
    command = [sys.executable, "-c", READER, str(file)]
    readers = [subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) for _ in range(2)]
    try:
        for reader in readers:
            assert reader.stdout is not None
            reader.stdout.readline()
        found = [
            {"bench": "memory", "process": number, **gib_of(reader.pid, file)} for number, reader in enumerate(readers)
        ]
    finally:
        for reader in readers:
            reader.communicate(timeout=60)
    for each in found:
        print(f"memory, process {each['process']}: RSS {each['Rss']} PSS {each['Pss']} private {each['Anonymous']} GiB")
    return found


def gib_of(pid: int, file: Path) -> dict[str, float]:
    """Rss, Pss and anonymous memory of one process' map of a file."""
    found, ours = dict.fromkeys(("Rss", "Pss", "Anonymous"), 0.0), False
    for line in Path(f"/proc/{pid}/smaps").read_text(encoding="utf-8").splitlines():
        first = line.split()[0]
        if not first.endswith(":"):
            ours = line.endswith(str(file))
        elif ours and first[:-1] in found:
            found[first[:-1]] += int(line.split()[1]) / (1 << 20)
    return {name: round(value, 2) for name, value in found.items()}


if __name__ == "__main__":
    main()
