"""Autoscaling by service level beside scaling by queue length, over traces, in a simulated cluster.

    python benchmarks/autoscaling.py [--quick] [--rate N] [--json FILE]

The cluster is DeepSeek-V4-Flash on H200 as `moeray plan` predicts it: a device is a shard or an expert group, and a
new one takes `join_s` to serve. Every policy sees what replicas and ingresses would say, every five seconds, and
starts with what serves the first minute.

    goals           moeray's policy with its defaults, and `join_s` as it is here
    queue length    what Ray Serve does by itself: ongoing requests over a target per shard, up after 30 s, down after
                    600 s (its defaults), groups in a constant ratio to shards. Target and ratio are the pair that is
                    cheapest over all traces among those that meet the goals on average as often as `goals` does.

The pair is chosen, as moeray's defaults were, on traces of one seed; what is printed and kept is of another. `met` is
the share of requests that met both goals; `hours` what was paid for, of shards and groups.
"""

from __future__ import annotations

import argparse
import math
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import plots
import records
from records import Record

from moeray.autoscaling import Goals, Limits, Memory, Observation, PolicySettings, decide
from moeray.autoscaling.simulator import TRACES, Outcome, Policy, Service, Trace, simulate
from moeray.planning import Efficiency, Machines, Topology, Work, step_time
from moeray.planning.formats import KV_BYTES, Formats
from moeray.planning.hardware import catalogue
from moeray.planning.memory import kv_bytes, shard_weights
from moeray.planning.spec import load_shape

TTFT_S, TPOT_S, MOST = 2.0, 0.05, 10_000
TARGETS = (6, 8, 10, 12, 16, 24)
RATIOS = (0.0625, 0.125, 0.25)
TUNED, JUDGED = 7, 11
"""Seeds."""
UP_S, DOWN_S, LOOK_BACK_S = 30.0, 600.0, 30.0
"""Ray Serve's upscale_delay_s, downscale_delay_s and look_back_period_s."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a tenth of the load, three targets (a minute)")
    parser.add_argument("--rate", type=float, default=50.0, help="requests/s of an ordinary moment (default 50)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the records there, facts and plots beside it")
    options = parser.parse_args()
    rate = options.rate / 10 if options.quick else options.rate
    service = flash_on_h200()
    tuned, traces = ([make(rate, np.random.default_rng(seed)) for make in TRACES.values()] for seed in (TUNED, JUDGED))
    ours = {each.name: run(each, service, ByGoals()) for each in tuned}
    print(f"goals: met {mean_met(ours):.4f} on average, {hours(ours):.0f} hours", flush=True)
    target, ratio = best_by_queue(tuned, service, mean_met(ours), options.quick)
    best = f"queue length, target {target}, {ratio:g} groups per shard"
    print(f"chosen: {best}; judged by other traces:", flush=True)
    ours = {each.name: run(each, service, ByGoals()) for each in traces}
    theirs = {each.name: run(each, service, ByQueue(target, ratio)) for each in traces}
    found = [
        record
        for each in traces
        for record in (record_of(each, "goals", ours[each.name]), record_of(each, best, theirs[each.name]))
    ]
    for record in found:
        print(record, flush=True)
    print(f"hours of goals / hours of queue length: {hours(ours) / hours(theirs):.3f}, "
          f"met {mean_met(ours):.4f} and {mean_met(theirs):.4f}")  # fmt: skip
    if options.json:
        records.write(options.json, found, rate=rate, ttft_s=TTFT_S, tpot_s=TPOT_S, service=str(service))
        for each in traces:
            file = options.json.with_name(f"{options.json.stem}_{each.name.replace(' ', '_')}.svg")
            plots.over_time(each.name, ours[each.name], theirs[each.name], file)


def flash_on_h200() -> Service:
    """A line through the planner's times at two batches, of one shard and one group."""
    shape, device = load_shape("deepseek-v4-flash"), catalogue()["H200"]
    kv, index = KV_BYTES["fp8"]
    formats = Formats("fp4", "fp8", kv, index, 1.03, 2.0)
    machines, topology = Machines(device, device, Efficiency()), Topology("split", 8, 8)
    small, large = (step_time(shape, formats, topology, machines, Work(each, 1200), (1,)) for each in (16, 256))
    prompt = step_time(shape, formats, topology, machines, Work(4096, 2000, True))
    own = [each.attention + each.shared + each.hop + each.head + each.fixed for each in (small, large)]
    free = device.memory * 0.9 - shard_weights(shape, formats)
    expert_token_us = (large.experts - small.experts) / 240
    return Service(
        places=256,
        kv_tokens=int(0.5 * free / (kv_bytes(shape, formats, 1200) / 1200)),
        own_s=(own[0] - 16 * (own[1] - own[0]) / 240) / 1e6,
        own_token_s=(own[1] - own[0]) / 240e6,
        expert_s=max(0.0, small.experts - 16 * expert_token_us) / 1e6,
        expert_token_s=expert_token_us / 1e6,
        prompt_token_s=prompt.total / 4096e6,
    )


@dataclass
class ByGoals:
    """moeray's policy with its defaults."""

    settings: PolicySettings = field(
        default_factory=lambda: PolicySettings(
            Goals(TTFT_S, TPOT_S), Limits(1, MOST), Limits(1, MOST), join_s=Service().join_s
        )
    )
    memory: Memory = field(default_factory=Memory)

    def __call__(self, seen: Observation) -> tuple[int, int]:
        self.memory, decision = decide(self.settings, self.memory, seen)
        return decision.shards.count, decision.groups.count if decision.groups else 0


@dataclass
class ByQueue:
    """Ray Serve's default for shards; groups in proportion."""

    target: float
    ratio: float
    recent: deque[tuple[float, float]] = field(default_factory=deque)
    above_since_s: float | None = None
    below_since_s: float | None = None

    def __call__(self, seen: Observation) -> tuple[int, int]:
        have = len(seen.shards) + seen.joining_shards
        self.recent.append((seen.now_s, sum(each.running + each.waiting for each in seen.shards)))
        while self.recent[0][0] < seen.now_s - LOOK_BACK_S:
            self.recent.popleft()
        wanted = max(1, min(MOST, math.ceil(sum(each for _, each in self.recent) / len(self.recent) / self.target)))
        self.above_since_s = (self.above_since_s or seen.now_s) if wanted > have else None
        self.below_since_s = (self.below_since_s or seen.now_s) if wanted < have else None
        since, delay_s = (self.above_since_s, UP_S) if wanted > have else (self.below_since_s, DOWN_S)
        count = wanted if since is not None and seen.now_s - since >= delay_s else have
        return count, max(1, round(count * self.ratio))


def run(trace: Trace, service: Service, policy: Policy) -> Outcome:
    """From what serves the trace's first minute at half of what a shard can."""
    first = trace.arrival_s < 60
    tokens_s = (trace.answer[first] * (service.own_s + service.expert_s) / 32).sum() / 60
    begin = max(1, math.ceil(2 * (tokens_s + trace.prompt[first].sum() * service.prompt_token_s / 60)))
    return simulate(trace, service, policy, shards=begin, groups=max(1, begin // 4))


def best_by_queue(traces: list[Trace], service: Service, least: float, quick: bool) -> tuple[int, float]:
    """Target and ratio that are cheapest among those that meet the goals as often.

    Raises:
        RuntimeError: none does: lower targets must be tried.
    """
    enough: list[tuple[float, int, float]] = []
    for target, ratio in _pairs(quick):
        outcomes = {each.name: run(each, service, ByQueue(target, ratio)) for each in traces}
        met = mean_met(outcomes)
        print(f"target {target}, {ratio:g} groups per shard: met {met:.4f}, {hours(outcomes):.0f} hours", flush=True)
        if met >= least:
            enough.append((hours(outcomes), target, ratio))
    if not enough:
        raise RuntimeError(f"no pair of target and ratio met the goals as often as {least:.4f}")
    _, target, ratio = min(enough)
    return target, ratio


def mean_met(outcomes: dict[str, Outcome]) -> float:
    """Over traces, each counting the same."""
    return float(np.mean([each.met(TTFT_S, TPOT_S) for each in outcomes.values()]))


def _pairs(quick: bool) -> Iterator[tuple[int, float]]:
    for target in (6, 10) if quick else TARGETS:
        for ratio in (0.25,) if quick else RATIOS:
            yield target, ratio


def hours(outcomes: dict[str, Outcome]) -> float:
    return sum(each.shard_hours + each.group_hours for each in outcomes.values())


def record_of(trace: Trace, policy: str, outcome: Outcome) -> Record:
    return {
        "trace": trace.name,
        "policy": policy,
        "requests": len(trace.arrival_s),
        "met": round(outcome.met(TTFT_S, TPOT_S), 4),
        "shard_hours": round(outcome.shard_hours, 1),
        "group_hours": round(outcome.group_hours, 1),
        "most": int((outcome.shards + outcome.groups).max()),
        "changes": outcome.changes,
    }


if __name__ == "__main__":
    main()
