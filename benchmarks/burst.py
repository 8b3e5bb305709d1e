"""A burst on a cluster of real processes, with numbers that follow the load and with fixed ones: who meets the goals?

    python benchmarks/burst.py [--quick] [--json FILE]

Two clusters, one after the other, get the same requests at the same moments: a quiet time, a burst of several times as
many, a quiet time again. One keeps the shard and the group that it begins with, one has `autoscaling`. A shard takes
PLACES requests at once, as one does whose memory is full; what comes beyond that waits. Two shards have a core each
less what starting, the group, the ingress and the clients take: on a machine of two cores a process that starts takes
from those that serve, which no cluster of several machines has to pay.

`met` is the share of requests of the burst that met both goals, the first token counted from the moment at which the
request was due; `process_s` the seconds that shards and groups ran from the burst's first request to the end;
`failed` counts requests, of all phases, that did not end with a whole answer. Every change of numbers is printed with
its reason.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import Any

import records
import uvloop
from callers import HttpCaller, Unanswered, chat
from records import Record, percentile
from whole import Running, cluster

MODEL = "moeray-tiny"
PLACES, ANSWER_TOKENS = 1, 48
TTFT_S, TPOT_S = 3.0, 0.1
QUIET_PER_S, BURST_PER_S = 0.2, 2.6
POOLS = {"attention": "attention_shard", "experts": "expert_group"}
FIXED: dict[str, Any] = {
    "attention": {"num_shards": 1, "engine_args": {"max_num_seqs": PLACES}},
    "experts": {"num_groups": 1},
}
SCALED = FIXED | {
    "autoscaling": {
        "ttft_p95_s": TTFT_S, "tpot_p95_s": TPOT_S, "attention": {"most": 2}, "experts": {"most": 2},
        "out_s": 5, "in_s": 20, "join_s": 15,
    },
}  # fmt: skip
LOOK_S = 5.0


@dataclass(frozen=True)
class Phases:
    """Lengths in seconds."""

    before: float
    burst: float
    after: float

    def arrivals(self, seed: int) -> Iterator[float]:
        """When requests come, in seconds since the first phase began; Poisson in each phase."""
        chance = random.Random(seed)  # noqa: S311 - no secret
        ends = list(accumulate([self.before, self.burst, self.after]))
        now = 0.0
        for end, rate in zip(ends, (QUIET_PER_S, BURST_PER_S, QUIET_PER_S), strict=True):
            while (now := now + chance.expovariate(rate)) < end:
                yield now
            now = end


QUICK, THOROUGH = Phases(10, 240, 90), Phases(20, 480, 120)


@dataclass
class Seen:
    """Of one cluster: per request when it was due, and its latencies or None; (moment, {pool: processes}); changes."""

    requests: list[tuple[float, float, float] | tuple[float, None, None]] = field(default_factory=list)
    sizes: list[tuple[float, dict[str, int]]] = field(default_factory=list)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a shorter burst (twelve minutes instead of twenty-two)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the records there")
    options = parser.parse_args()
    phases = QUICK if options.quick else THOROUGH
    found = []
    for name, config in (("fixed", FIXED), ("autoscaling", SCALED)):
        print(f"{name}: starting", flush=True)
        with cluster(config) as running:
            found.append(record_of(name, phases, uvloop.run(watched(running, phases))))
        print(found[-1], flush=True)
    if options.json:
        records.write(options.json, found, places=PLACES, burst_per_s=BURST_PER_S, ttft_s=TTFT_S, tpot_s=TPOT_S)


async def watched(running: Running, phases: Phases) -> Seen:
    """All phases, while the cluster's numbers are looked at."""
    seen, began = Seen(), time.monotonic()
    looking = asyncio.create_task(_look(running, seen, began))
    async with asyncio.TaskGroup() as group:
        for number, due_s in enumerate(phases.arrivals(seed=0)):
            await asyncio.sleep(max(0.0, began + due_s - time.monotonic()))
            group.create_task(_ask(running.http, number, began, due_s, seen))
    await asyncio.sleep(max(0.0, began + phases.before + phases.burst + phases.after - time.monotonic()))
    looking.cancel()
    return seen


async def _ask(address: str, number: int, began: float, due_s: float, seen: Seen) -> None:
    host, _, port = address.partition(":")
    body = chat(MODEL, number) | {"max_tokens": ANSWER_TOKENS}
    try:
        caller = await HttpCaller.connect(host, int(port), {})
        answer = await caller.ask(body)
        tpot_s = (time.monotonic() - answer.first) / max(1, answer.tokens - 1)
        await caller.close()
        seen.requests.append((due_s, answer.first - began - due_s, tpot_s))
    except (OSError, Unanswered) as error:
        print(f"request {number}: {error}", flush=True)
        seen.requests.append((due_s, None, None))


async def _look(running: Running, seen: Seen, began: float) -> None:
    """The cluster's numbers every LOOK_S, and what autoscaling says of them where they change."""
    while True:
        state = await asyncio.to_thread(running.status)
        ready = [each["role"] for each in state["processes"] if each["state"] == "ready"]
        sizes = {pool: ready.count(role) for pool, role in POOLS.items()}
        if not seen.sizes or seen.sizes[-1][1] != sizes:
            reasons = "; ".join(f"{pool}: {each['reason']}" for pool, each in state.get("autoscaling", {}).items())
            print(f"{time.monotonic() - began:5.0f} s  {sizes}  {reasons}", flush=True)
        seen.sizes.append((time.monotonic() - began, sizes))
        await asyncio.sleep(LOOK_S)


def record_of(name: str, phases: Phases, seen: Seen) -> Record:
    """Latencies are of the burst's requests."""
    begins, ends = phases.before, phases.before + phases.burst
    burst = [each for each in seen.requests if begins <= each[0] < ends]
    answered = [(ttft, tpot) for _, ttft, tpot in burst if ttft is not None and tpot is not None]
    met = sum(ttft <= TTFT_S and tpot <= TPOT_S for ttft, tpot in answered)
    ttfts, tpots = ([each[which] for each in answered] for which in (0, 1))
    return {
        "cluster": name,
        "requests": len(seen.requests),
        "failed": sum(ttft is None for _, ttft, _ in seen.requests),
        "met": round(met / len(burst), 3),
        "ttft_p50_s": round(percentile(ttfts, 50), 2),
        "ttft_p95_s": round(percentile(ttfts, 95), 2),
        "tpot_p95_s": round(percentile(tpots, 95), 3),
        "most": {pool: max(sizes[pool] for _, sizes in seen.sizes) for pool in POOLS},
        "at_end": seen.sizes[-1][1],
        "process_s": round(process_seconds(seen.sizes, begins)),
    }


def process_seconds(sizes: list[tuple[float, dict[str, int]]], begins: float) -> float:
    """Of all pools since then; between two looks there are as many as at the first."""
    moments = [at for at, _ in sizes[1:]] + [sizes[-1][0]]
    return sum(
        max(0.0, until - max(at, begins)) * sum(pools.values())
        for (at, pools), until in zip(sizes, moments, strict=True)
    )


if __name__ == "__main__":
    main()
