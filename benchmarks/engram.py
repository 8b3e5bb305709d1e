"""Engram tables in host memory: what mapping costs, beside a table in private memory and beside a plain copy.

    python benchmarks/engram.py [--quick] [--json FILE]

decode: tokens per second of an engine of the bundled model whose tables are mapped (`host`), or at two row servers on
another core (`sharded`), beside one that has them in memory of its own (`device`), in turn on one core; `ratio` within
a turn, above 1 `device` is slower.

gather: rows per second of a generated table of random bytes, rows of 256 FP8 values and 8 scales as DeepSeek-V4.1 has
them, 48 rows a token at random: out of the mapped file, out of private memory, and the floor: copying as many bytes in
one piece. `us_per_token` includes turning FP8 into bf16. `small_pages`: times as long from a map without huge pages.

gate: adding the gated value to four bf16 streams of 4,096 in the compiled pass, beside the formula in torch, and the
floor: copying as many bytes as are read and written.

memory: two processes that read every row of the same file: RSS and PSS of their maps, and what is private.
"""

from __future__ import annotations

import argparse
import mmap
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import numpy as np
import records
import torch
from engram_engines import PLACEMENTS, PLAIN, EngramEngine, RowServers
from pinned import Process, pin, two_cores

from moeray.deepseek_v4.engram import add_gated_value
from moeray.deepseek_v4.engram_gate_kernel import add_gated_value_bf16
from moeray.deepseek_v4.engram_kernel import gather_fp8, products
from moeray.engram import FileRange, Table, prefault
from moeray.tiny import checkpoint_path

WIDTH, BLOCKS, ROWS_PER_TOKEN = 256, 8, 48
ROW_BYTES = WIDTH + BLOCKS
STEP_TOKENS = (1, 16, 512)
NUM_STREAMS, HIDDEN, EPS = 4, 4096, 1e-6
GIB = 1 << 30
COST = 0.03
"""Target: what mapping may cost of decode throughput."""


@dataclass(frozen=True)
class Effort:
    """Size of the table in private memory too, of the large one, and how often things are done."""

    table_bytes: int
    large_bytes: int
    rounds: int
    decode_steps: int
    repeats: int


QUICK = Effort(1 * GIB, 8 * GIB, rounds=20, decode_steps=60, repeats=40)
THOROUGH = Effort(4 * GIB, 8 * GIB, rounds=60, decode_steps=120, repeats=200)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a smaller table and fewer repeats (under three minutes)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the records there, facts beside it")
    parser.add_argument("--directory", type=Path, default=Path.cwd(), help="for the tables (9 GiB); a disk, not memory")
    options = parser.parse_args()
    effort = QUICK if options.quick else THOROUGH
    core, other = two_cores()
    found = decoding(core, other, effort)
    pin([core])
    torch.set_num_threads(1)
    found += gating(effort)
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


def decoding(core: int, other: int, effort: Effort) -> list[records.Record]:
    servers, engine = Process(RowServers, [other]), Process(EngramEngine, [core])
    found: list[records.Record] = []
    try:
        engine.ask("start", checkpoint_path(), None)
        engine.ask("open_placements", servers.ask("serve"))
        names = [each.placement for each in PLACEMENTS]
        for batch in (1, 8):
            rounds = []
            for number in range(effort.rounds + 1):
                turns = names[:: 1 if number % 2 else -1]
                rounds.append({each: engine.ask("decode_from", each, batch, effort.decode_steps) for each in turns})
            found += [compared(batch, name, rounds[1:]) for name in names if name != PLAIN]
    finally:
        for process in (servers, engine):
            process.end()
    return found


def compared(batch: int, placement: str, rounds: list[dict[str, float]]) -> records.Record:
    """One placement beside private memory."""
    ratios = [each[placement] / each[PLAIN] for each in rounds]
    speed = round(statistics.median(each[placement] for each in rounds))
    record = {"bench": "decode", "placement": placement, "batch": batch, "tokens_per_s": speed}
    record |= records.spread(ratios)
    met = "met" if statistics.median(ratios) >= 1 - COST else "missed"
    target = f": target {1 - COST} {met}" if placement == "host" else ""
    print(f"decode, batch {batch}: {placement} / device {spread(record)}{target}", flush=True)
    return record


def gating(effort: Effort) -> list[records.Record]:
    generator, found = torch.Generator().manual_seed(0), list[records.Record]()
    weights = 1 + 0.1 * torch.randn(2, NUM_STREAMS, HIDDEN, generator=generator)
    for tokens in STEP_TOKENS:
        streams = torch.randn(tokens, NUM_STREAMS, HIDDEN, generator=generator).bfloat16()
        kv = torch.randn(tokens, (NUM_STREAMS + 1) * HIDDEN, generator=generator).bfloat16()
        source, target = torch.empty(2, 2 * streams.numel() + kv.numel(), dtype=torch.bfloat16)
        ways: dict[str, Callable[[], object]] = {
            "compiled": partial(add_gated_value_bf16, streams, kv, weights[0] * weights[1], EPS),
            "torch": partial(add_gated_value, streams, kv, weights[0], weights[1], EPS),
            "memcpy": partial(target.copy_, source),
        }
        seconds = in_turn(ways, max(5, effort.repeats // 4))
        took, floor = (statistics.median(seconds[way]) for way in ("compiled", "memcpy"))
        ratios = [torch / own for torch, own in zip(seconds["torch"], seconds["compiled"], strict=True)]
        record: records.Record = {"bench": "gate", "tokens": tokens, "us": round(1e6 * took, 1)}
        record |= {"times_memcpy": round(took / floor, 1), **records.spread(ratios)}
        found.append(record)
        print(f"gate, {tokens} tokens: {record['us']} us, torch / compiled {spread(record)}", flush=True)
    return found


def in_turn(ways: dict[str, Callable[[], object]], repeats: int) -> dict[str, list[float]]:
    """Seconds of each call; the first of each is not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for repeat in range(repeats + 1):
        for name, way in ways.items():
            began = time.perf_counter()
            way()
            if repeat:
                seconds[name].append(time.perf_counter() - began)
    return seconds


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


def table_of(file: Path, rows: int, advice: int) -> Table:
    with file.open("rb") as stream:
        mapped = mmap.mmap(stream.fileno(), 0, prot=mmap.PROT_READ)
    mapped.madvise(advice)
    whole = np.frombuffer(mapped, np.uint8)
    values = np.asarray(whole[: rows * WIDTH]).reshape(rows, WIDTH)
    return Table(values, np.asarray(whole[rows * WIDTH : rows * ROW_BYTES]).reshape(rows, BLOCKS))


def gathering(file: Path, num_bytes: int, effort: Effort, *, with_copy: bool) -> list[records.Record]:
    rows = num_bytes // ROW_BYTES
    began = time.perf_counter()
    prefault([FileRange(file, 0, rows * ROW_BYTES)], lambda *_: None)
    prefault_s = time.perf_counter() - began
    mapped, small = (table_of(file, rows, each) for each in (mmap.MADV_HUGEPAGE, mmap.MADV_NOHUGEPAGE))
    tables = {"mapped": mapped, "small": small, **({"private": mapped.copied()} if with_copy else {})}
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
            "small_pages": round(statistics.median(seconds["small"]) / of_map, 2),
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
            f"{record['us_per_token']} us per token, {record['times_memcpy']} x memcpy, "
            f"{record['small_pages']} x as long from small pages{beside}",
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
        for name, table in tables.items():
            index = random.integers(0, rows, count)  # two maps have the same bytes in the cores' caches
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
