"""Time to the first token with a prefix on the device, in the node, in Redis and nowhere; and chats on two shards.

    python benchmarks/kv_cache.py [--quick] [--json FILE]

paths: one engine for each store, on one core, Redis on the other; one request at a time. Of every prompt the first
token is timed with nothing cached (`cold`), with everything on the device, and with everything in the store alone:
fetched whatever that costs, computed whatever that costs, and as moeray chooses. `ratio` is fetched / computed in the
same round. `regret` is chosen / the faster of the two; a Redis behind a slow link is a store of its own.

chats: two engines, a core for each; users with one system prompt of 1,500 tokens take turns on either shard as round
robin would send them. With the stores, without them, and plain vLLM (its own model and experts) without them.

decode: tokens per second of an engine with both stores, beside one without; `ratio` within a pair.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import tempfile
import threading
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import records
from kv_engines import First, KvEngine
from pinned import Process, pin, two_cores
from slow_link import SlowLink

from moeray.config import KvCacheConfig
from moeray.kv_cache.node_blocks import default_directory
from moeray.tiny import checkpoint_path

BLOCK_TOKENS = 256
SYSTEM_TOKENS, USER_TOKENS, ANSWER_TOKENS = 1500, 40, 24
VOCABULARY = (10, 1500)
BATCHES, DECODE_STEPS = (1, 8), 60
CHOICES = (("fetched", "fetch"), ("computed", "compute"), ("chosen", "measured"))
REPEATS, REPEAT_S = 7, 0.5
PATHS = ("cold", "device", "fetched", "computed", "chosen")
REGRET = 1.1
"""Target of the 95th percentile of chosen / best."""


@dataclass(frozen=True)
class Effort:
    """Prefixes in tokens, rounds of each, users and turns of the chats, speeds of slow links."""

    prefixes: tuple[int, ...]
    rounds: int
    users: int
    turns: int
    slow_mib_s: tuple[float, ...]


QUICK = Effort((512, 2048, 4096), rounds=2, users=8, turns=2, slow_mib_s=(1.0,))
THOROUGH = Effort((512, 1024, 2048, 4096, 7936), rounds=5, users=20, turns=3, slow_mib_s=(8.0, 1.0))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer prefixes, rounds and users (under three minutes)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the records there, facts beside it")
    options = parser.parse_args()
    effort = QUICK if options.quick else THOROUGH
    shard_core, other_core = two_cores()
    pin([other_core])
    found: list[records.Record] = []
    with redis_server() as url, tempfile.TemporaryDirectory(dir=default_directory().parent) as folder:
        for store, kv_cache in stores_of(url, folder, effort):
            with contextlib.ExitStack() as stack:
                if "MiB/s" in store:
                    kv_cache |= {"redis_url": stack.enter_context(slow(url, float(store.split()[-1])))}
                engine = Process(KvEngine, [shard_core])
                stack.callback(engine.end)
                engine.ask("start", checkpoint_path(), settings(**kv_cache))
                for record in paths(engine, store, effort):
                    found.append(record)
                    print(describe(record), flush=True)
        print(regret_of(found), flush=True)
        for way, kv_cache, plain in ways(url, folder):
            found.append(chats(way, kv_cache, plain, (shard_core, other_core), effort))
            print(describe(found[-1]), flush=True)
        found += steady(url, folder, shard_core, effort)
        print("\n".join(map(describe, found[-len(BATCHES) :])), flush=True)
    if options.json:
        records.write(options.json, found, **asdict(effort))


def stores_of(url: str, folder: str, effort: Effort) -> Iterator[tuple[str, dict[str, Any]]]:
    yield "node", {"host_bytes": 1 << 30, "host_directory": f"{folder}/paths"}
    yield "redis", {"host_bytes": 0, "redis_url": url}
    for speed in effort.slow_mib_s:
        yield f"redis, MiB/s {speed:g}", {"host_bytes": 0, "timeout_s": 30.0}


def settings(**kv_cache: Any) -> dict[str, Any]:
    return asdict(KvCacheConfig(**{"staging_bytes": 128 << 20, **kv_cache}))


@contextlib.contextmanager
def redis_server() -> Iterator[str]:
    """The development environment's own; the tests' class starts it."""
    import sys

    sys.path.insert(0, str(records.ROOT / "tests"))
    from redis_server import RedisServer

    with tempfile.TemporaryDirectory() as folder:
        server = RedisServer(Path(folder), appendonly="no", maxmemory="2gb", maxmemory_policy="allkeys-lru")
        server.start()
        try:
            yield server.url
        finally:
            server.kill()


@contextlib.contextmanager
def slow(url: str, mib_per_s: float) -> Iterator[str]:
    host, _, port = url.removeprefix("redis://").partition("/")[0].partition(":")
    with SlowLink((host, int(port)), mib_per_s * 2**20) as address:
        yield f"redis://{address[0]}:{address[1]}/0"


def paths(engine: Process, store: str, effort: Effort) -> Iterator[records.Record]:
    """One record per prefix. What computing and fetching cost is learned from a few prompts before."""
    random = np.random.default_rng(list(store.encode()))  # what another engine stored in Redis is not cold
    for length in (300, 700, 1500):
        prompt = random.integers(*VOCABULARY, length).tolist()
        for _ in range(3):
            engine.ask("ask", prompt)
            engine.ask("forget")
    for prefix in effort.prefixes:
        rounds = [
            one_round(engine, random.integers(*VOCABULARY, prefix + 1).tolist(), number)
            for number in range(effort.rounds)
        ]
        ms = {path: [1e3 * each[path].seconds for each in rounds] for path in rounds[0]}
        medians = {path: statistics.median(values) for path, values in ms.items()}
        ratios = [fetched / computed for fetched, computed in zip(ms["fetched"], ms["computed"], strict=True)]
        yield {
            "bench": "paths",
            "store": store,
            "prefix": prefix,
            **{f"{path}_ms": round(value, 1) for path, value in medians.items()},
            **records.spread(ratios),
            "regret": round(medians["chosen"] / min(medians["fetched"], medians["computed"]), 3),
            "chose_to_fetch": sum(each["chosen"].cached > 0 for each in rounds),
            "rounds": len(rounds),
            "same_text": all(len({first.text for first in each.values()}) == 1 for each in rounds),
        }


def one_round(engine: Process, prompt: list[int], number: int) -> dict[str, First]:
    """Every path to this prompt's first token, the store having it from the second on.

    Which of the last three comes first changes from round to round; each is the median of some, where it is short.
    """
    found = {"cold": engine.ask("ask", prompt)}
    engine.ask("settle")
    found["device"] = engine.ask("ask", prompt)
    for path, how in (CHOICES + CHOICES)[number % len(CHOICES) :][: len(CHOICES)]:
        engine.ask("always", how)
        times: list[First] = []
        while len(times) < REPEATS and sum(first.seconds for first in times) < REPEAT_S:
            engine.ask("forget")
            times.append(engine.ask("ask", prompt))
        found[path] = sorted(times, key=lambda first: first.seconds)[len(times) // 2]
    return found


def regret_of(found: Sequence[records.Record]) -> str:
    regrets = [each["regret"] for each in found if each["bench"] == "paths"]
    worst = records.percentile(regrets, 95)
    verdict = "met" if worst <= REGRET else "missed"
    return f"regret (chosen / best) p95 {worst:.2f} over {len(regrets)} stores and prefixes: target {REGRET} {verdict}"


def ways(url: str, folder: str) -> Iterator[tuple[str, dict[str, Any] | None, bool]]:
    yield "node and Redis", settings(host_bytes=1 << 30, host_directory=f"{folder}/chats", redis_url=url), False
    yield "no store", None, False
    yield "vLLM alone", None, True


def chats(
    way: str, kv_cache: dict[str, Any] | None, plain: bool, cores: Sequence[int], effort: Effort
) -> records.Record:
    """Turn after turn of every user; the shards work side by side, each on one request at a time."""
    engines = [Process(KvEngine, [core]) for core in cores]
    try:
        for engine in engines:
            engine.tell("start", checkpoint_path(), kv_cache, plain)
        for engine in engines:
            engine.answer()
            engine.ask("ask", [5] * 300, 2)
            engine.ask("ask", [6] * 700, 2)
        random = np.random.default_rng(2)
        system = random.integers(*VOCABULARY, SYSTEM_TOKENS).tolist()
        talks = [list(system) for _ in range(effort.users)]
        firsts: list[tuple[int, First, int]] = []
        for turn in range(effort.turns):
            for user in talks:
                user += random.integers(*VOCABULARY, USER_TOKENS).tolist()
            answers = one_turn(engines, talks, turn)
            for user, first in zip(talks, answers, strict=True):
                firsts.append((turn, first, len(user)))
                user += first.text
        later = [1e3 * first.seconds for turn, first, _ in firsts if turn]
        every = [1e3 * first.seconds for _, first, _ in firsts]
        return {
            "bench": "chats",
            "way": way,
            "users": effort.users,
            "cached": round(sum(first.cached for _, first, _ in firsts) / sum(size for *_, size in firsts), 3),
            "ttft_p50_ms": round(statistics.median(every), 1),
            "ttft_p95_ms": round(records.percentile(every, 95), 1),
            "later_p50_ms": round(statistics.median(later), 1),
        }
    finally:
        for engine in engines:
            engine.end()


def steady(url: str, folder: str, core: int, effort: Effort) -> list[records.Record]:
    """Decoding with both stores on, beside the same engine without, in turn on one core."""
    both = settings(host_bytes=1 << 30, host_directory=f"{folder}/steady", redis_url=url)
    engines = [Process(KvEngine, [core]) for _ in range(2)]
    try:
        for engine, kv_cache in zip(engines, (both, None), strict=True):
            engine.ask("start", checkpoint_path(), kv_cache)
            engine.ask("decode", 2, 10)
        found = []
        for batch in BATCHES:
            pairs = []
            for number in range(2 * effort.rounds):
                turns = engines if number % 2 else engines[::-1]
                speeds = {engine: engine.ask("decode", batch, DECODE_STEPS) for engine in turns}
                pairs.append([speeds[engine] for engine in engines])
            ratios = [with_stores / without for with_stores, without in pairs]
            speed = {"tokens_per_s": round(statistics.median(each for each, _ in pairs))}
            found.append({"bench": "decode", "batch": batch, **speed, **records.spread(ratios)})
        return found
    finally:
        for engine in engines:
            engine.end()


def one_turn(engines: Sequence[Process], talks: Sequence[list[int]], turn: int) -> list[First]:
    """User u's turn t runs on shard u + t: nobody stays where the last turn was."""
    answers: dict[int, First] = {}

    def work(shard: int) -> None:
        for user in range(len(talks)):
            if (user + turn) % len(engines) == shard:
                answers[user] = engines[shard].ask("ask", talks[user], ANSWER_TOKENS)

    threads = [threading.Thread(target=work, args=(shard,)) for shard in range(len(engines))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [answers[user] for user in range(len(talks))]


def describe(record: records.Record) -> str:
    if record["bench"] == "chats":
        return (
            f"chats, {record['way']}: {100 * record['cached']:.0f} % of prompt tokens not computed, TTFT p50 "
            f"{record['ttft_p50_ms']:.0f} p95 {record['ttft_p95_ms']:.0f} ms, of later turns p50 "
            f"{record['later_p50_ms']:.0f} ms"
        )
    if record["bench"] == "decode":
        spread = f"{record['ratio']:.3f} ({record['ratio_min']:.3f}..{record['ratio_max']:.3f})"
        return (
            f"decode, batch {record['batch']}: {record['tokens_per_s']} tokens/s, {spread} of an engine without stores"
        )
    times = ", ".join(f"{path} {record[path + '_ms']:.0f}" for path in PATHS)
    return (
        f"{record['store']}, {record['prefix']} tokens: {times} ms (fetched / computed {record['ratio']:.2f}, fetched "
        f"in {record['chose_to_fetch']} of {record['rounds']}, regret {record['regret']:.2f}"
        f"{'' if record['same_text'] else ', OTHER TEXT'})"
    )


if __name__ == "__main__":
    main()
