"""What the door costs: the ingress beside bare `vllm serve` and Ray Serve LLM, around like engines on the same cores.

    python benchmarks/ingress.py [--quick] [--json FILE] [--without-ray]
    python benchmarks/ingress.py --layers [--quick] [--json FILE]

All doors are up at the same time and are asked in turn, so that all see the same noise. Every engine has the last core
to itself; every front, relay, proxy, and the clients have the first one. Closed-loop clients stream chats, each
with a prompt of its own, greedily, of a fixed length, over connections that stay open.

    vllm serve          API server and engine, as `vllm serve` starts them
    moeray              ingress, shard process (the relay) and engine
    moeray, tenants     the same with a key to check, all limits to count, and usage to record
    ..., gRPC           the same ingress by `moeray.v1.Inference`; its client costs more than the one for HTTP
    Ray Serve LLM       `build_openai_app` with its defaults; asked after the others, with two of them beside it

`added_ms` is the difference of the median times to the first token, `throughput_ratio` that of tokens per second, each
against `vllm serve` round by round: a median with the range of the rounds. `cpu_ms` is CPU per request by role.

`--layers` tells where a single client's time goes, by timestamps inside the processes (which cost some microseconds).
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import json
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import doors
import records
import uvloop
from callers import call_all, chat
from door_layers import layers, read_marks
from doors import Door, NotServed
from records import Record, percentile

from moeray.tiny import checkpoint_path

MODEL = "moeray-tiny"
BASELINE, OURS, TENANTS, RAY = "vllm serve", "moeray", "moeray, tenants", "Ray Serve LLM"
MAX_ADDED_MS, MIN_THROUGHPUT = 1.5, 0.95
WARM_UP = 8
BESIDE_RAY = " beside Ray"
"""After the name of a door that was measured while Ray ran."""


@dataclass(frozen=True)
class Effort:
    """Requests of one window by the number of clients; rounds without Ray and with it; chats of one traced door."""

    requests: dict[int, int]
    rounds: int
    rounds_with_ray: int
    traced: int


QUICK = Effort({1: 4, 8: 16, 32: 64}, rounds=3, rounds_with_ray=2, traced=10)
THOROUGH = Effort({1: 8, 8: 32, 32: 96}, rounds=9, rounds_with_ray=5, traced=60)


@dataclass(frozen=True)
class Window:
    """What one door did in its turn. `cpu_ms`: per request, by role."""

    ttfts_ms: list[float]
    tokens_per_s: float
    cpu_ms: dict[str, float]

    @property
    def ttft_ms(self) -> float:
        return statistics.median(self.ttfts_ms)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer and shorter rounds")
    parser.add_argument("--without-ray", action="store_true", help="leave out Ray Serve LLM")
    parser.add_argument("--layers", action="store_true", help="the layers of a chat's way instead")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the records there")
    options = parser.parse_args()
    effort = QUICK if options.quick else THOROUGH
    notes: dict[str, str] = {}
    if options.layers:
        found = uvloop.run(trace(effort))
    else:
        found, notes = uvloop.run(measure(effort, with_ray=not options.without_ray))
    if not options.layers:
        print("\n".join(verdicts(found)))
    if options.json:
        records.write(options.json, found, rounds=effort.rounds, **notes)


LOG = Path(tempfile.gettempdir()) / "moeray-bench-ingress.log"


async def trace(effort: Effort) -> list[Record]:
    """One record per door: microseconds by layer."""
    found, numbers = [], itertools.count()
    with tempfile.TemporaryDirectory(prefix="moeray-bench-") as name, contextlib.ExitStack() as stack:
        folder = Path(name)
        baseline = stack.enter_context(doors.bare(checkpoint_path(), MODEL, LOG, trace=folder))
        own = stack.enter_context(doors.ours(checkpoint_path(), MODEL, folder, LOG, trace=folder))
        asked = {baseline: ["bare"], own[0]: ["shard", OURS], own[2]: ["shard", TENANTS]}
        await asyncio.to_thread(doors.settle, list(asked))
        for door, titles in asked.items():
            caller = await door.caller()
            await call_all([caller], WARM_UP, lambda: chat(MODEL, next(numbers)))
            since = time.monotonic()
            answers, _ = await call_all([caller], effort.traced, lambda: chat(MODEL, next(numbers)))
            await caller.close()
            found.append(layers(door.name, answers, await asyncio.to_thread(read_marks, folder, titles, since)))
            print(json.dumps(found[-1], indent=1), flush=True)
    return found


async def measure(effort: Effort, *, with_ray: bool) -> tuple[list[Record], dict[str, str]]:
    """(records, what could not be measured and why)."""
    model, log = checkpoint_path(), LOG
    print(f"what the servers print: {log}", flush=True)
    found, notes = [], {}
    with tempfile.TemporaryDirectory(prefix="moeray-bench-") as folder, contextlib.ExitStack() as stack:
        baseline = stack.enter_context(doors.bare(model, MODEL, log))
        own = stack.enter_context(doors.ours(model, MODEL, Path(folder), log))
        found += await _compare([baseline, *own], effort, effort.rounds)
        if with_ray:
            try:
                theirs = stack.enter_context(doors.ray_serve_llm(model, MODEL, log))
                found += await _compare([baseline, own[0], theirs], effort, effort.rounds_with_ray, BESIDE_RAY)
            except (NotServed, ExceptionGroup) as error:  # the others' results stand
                notes[RAY] = str(error)
                print(f"{RAY}: {error}", flush=True)
    return found, notes


async def _compare(asked: Sequence[Door], effort: Effort, rounds: int, beside: str = "") -> list[Record]:
    """All of these doors in turn, at every number of clients. `beside`: after the name of each but the last."""
    await asyncio.to_thread(doors.settle, asked)
    numbers = itertools.count()
    found = []
    for num_clients, num_requests in effort.requests.items():
        windows: dict[str, list[Window]] = {door.name: [] for door in asked}
        for door in asked:
            await _window(door, num_clients, max(WARM_UP, num_clients), numbers)
        for number in range(rounds):
            for door in asked if number % 2 == 0 else reversed(asked):
                windows[door.name].append(await _window(door, num_clients, num_requests, numbers))
        new = records_of(num_clients, windows)
        for record in new:
            record["door"] += beside if record["door"] != RAY else ""
        print("\n".join(map(describe, new)), flush=True)
        found += new
    return found


async def _window(door: Door, num_clients: int, num_requests: int, numbers: Iterator[int]) -> Window:
    """One door's turn; its connections are opened before it begins."""
    callers = [await door.caller() for _ in range(num_clients)]
    try:
        before = door.cpu_s()
        answers, seconds = await call_all(callers, num_requests, lambda: chat(MODEL, next(numbers)))
        after = door.cpu_s()
    finally:
        for caller in callers:
            await caller.close()
    return Window(
        [1e3 * each.ttft_s for each in answers],
        sum(each.tokens for each in answers) / seconds,
        {role: 1e3 * (after[role] - before[role]) / num_requests for role in after},
    )


def records_of(num_clients: int, windows: dict[str, list[Window]]) -> list[Record]:
    """Each door against the bare one, round by round."""
    return [
        {
            "door": name,
            "clients": num_clients,
            "ttft_p50_ms": round(percentile(ttfts := [each for window in own for each in window.ttfts_ms], 50), 2),
            "ttft_p95_ms": round(percentile(ttfts, 95), 2),
            **_against(own, windows[BASELINE]),
            "tokens_per_s": round(statistics.median(each.tokens_per_s for each in own), 1),
            "cpu_ms": {role: round(statistics.median(each.cpu_ms[role] for each in own), 2) for role in own[0].cpu_ms},
            "requests": len(ttfts),
        }
        for name, own in windows.items()
    ]


def _against(own: Sequence[Window], bare: Sequence[Window]) -> dict[str, float]:
    pairs = list(zip(own, bare, strict=True))
    added = [each.ttft_ms - other.ttft_ms for each, other in pairs]
    ratios = records.spread([each.tokens_per_s / other.tokens_per_s for each, other in pairs])
    return {
        "added_ms": round(statistics.median(added), 2),
        "added_ms_min": round(min(added), 2),
        "added_ms_max": round(max(added), 2),
        **{f"throughput_{name}": value for name, value in ratios.items()},
    }


def verdicts(found: Sequence[Record]) -> list[str]:
    """A line for each target: what it is, what was measured, whether it is met."""
    lines = []
    for each in found:
        if each["door"] in (OURS, TENANTS):
            added, ratio, who = each["added_ms"], each["throughput_ratio"], f"{each['door']}, {each['clients']} clients"
            lines.append(_verdict(f"{who}: added <= {MAX_ADDED_MS} ms", f"{added:+.2f} ms", added <= MAX_ADDED_MS))
            least = f"{who}: >= {MIN_THROUGHPUT} of {BASELINE}'s tokens/s"
            lines.append(_verdict(least, f"{ratio:.3f}", ratio >= MIN_THROUGHPUT))
    theirs = {each["clients"]: each for each in found if each["door"] == RAY}
    for each in found:
        if each["door"] == f"{OURS}{BESIDE_RAY}":
            other, who = theirs[each["clients"]], f"{OURS}, {each['clients']} clients, beats {RAY}"
            for key, sign, unit in (("ttft_p50_ms", -1, "ms to the first token"), ("tokens_per_s", 1, "tokens/s")):
                wins = sign * (each[key] - other[key]) > 0
                lines.append(_verdict(f"{who}: {unit}", f"{each[key]:.1f} to {other[key]:.1f}", wins))
    return lines


def _verdict(target: str, measured: str, met: bool) -> str:
    return f"{target}: {measured}, {'met' if met else 'MISSED'}"


def describe(record: Record) -> str:
    cpu = ", ".join(f"{role} {value:.1f}" for role, value in record["cpu_ms"].items())
    return (
        f"{record['door']:>24} c {record['clients']:2}: TTFT {record['ttft_p50_ms']:6.2f} ms, "
        f"p95 {record['ttft_p95_ms']:6.2f}, added {record['added_ms']:+5.2f} "
        f"({record['added_ms_min']:+.2f}..{record['added_ms_max']:+.2f}); {record['tokens_per_s']:7.1f} tokens/s, "
        f"{record['throughput_ratio']:.3f} "
        f"({record['throughput_ratio_min']:.2f}..{record['throughput_ratio_max']:.2f}); CPU ms a request: {cpu}"
    )


if __name__ == "__main__":
    main()
