"""An observation becomes a wanted number for each pool, with its reason.

A pool **grows** as far as the load needs, at once: shards for requests, KV, or tokens asked for per second against what
one was seen to manage; groups by the time they compute. A missed goal says that the present load is too much for the
present number: this is remembered per process, in the load's own measure, which does not depend on how many there are.
So a pool that has grown does not **shrink** to where the same load was too much. It shrinks slowly, one step at a time,
only on numbers that are fresh and complete, and never below what running requests hold.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from moeray.autoscaling.limits import Limits, PolicySettings
from moeray.autoscaling.observation import GroupLoad, Observation, ShardLoad
from moeray.autoscaling.trend import Trend


@dataclass(frozen=True, slots=True)
class Wanted:
    """Processes of one pool, and why in one sentence; `cause` is that in one word, of few, where the number changes."""

    count: int
    reason: str
    cause: str = ""


@dataclass(frozen=True, slots=True)
class Decision:
    """`groups` is None where the model is not split."""

    shards: Wanted
    groups: Wanted | None = None


@dataclass(frozen=True, slots=True)
class PoolMemory:
    """What the next decision must know of a pool.

    Attributes:
        too_much: the smallest load per process at which it was too much.
        grew_s: when it grew.
        changed_s: when it grew or shrank.
        low_since_s: since when fewer would have been enough; None: they would not.
    """

    too_much: float = math.inf
    grew_s: float = -math.inf
    changed_s: float = -math.inf
    low_since_s: float | None = None


@dataclass(frozen=True, slots=True)
class Memory:
    """Between two decisions."""

    tokens: Trend = field(default_factory=Trend)
    shards: PoolMemory = field(default_factory=PoolMemory)
    groups: PoolMemory = field(default_factory=PoolMemory)


@dataclass(frozen=True, slots=True)
class _Need:
    """Processes that something (`cause`, one word) needs, not rounded; `reason` goes on after "for "."""

    count: float
    reason: str
    cause: str


@dataclass(frozen=True, slots=True)
class _Missed:
    """A goal, in words, and how many times as long as it says it takes."""

    reason: str
    times: float


@dataclass(frozen=True, slots=True)
class _Pool:
    """One pool at this moment.

    Attributes:
        serving, joining: processes.
        needs: of the load; none: not known.
        floor: what is in use now and cannot be elsewhere.
        load: all of it, in the measure that is remembered; None: not known.
        is_whole: every process has said lately how it is.
        is_full: of shards: this load is too much, whatever the goals say.
        is_settled: `load` stands still; of one that has just begun, or ended, nothing is learned.
    """

    limits: Limits
    memory: PoolMemory
    serving: int
    joining: int
    needs: tuple[_Need, ...]
    floor: int
    load: float | None
    is_whole: bool
    is_full: bool = False
    is_settled: bool = True


def decide(settings: PolicySettings, memory: Memory, seen: Observation) -> tuple[Memory, Decision]:
    """The numbers that are wanted now. Pure: the same arguments give the same answer.

    Args:
        memory: of the last call; `Memory()` for the first.
    """
    tokens = memory.tokens if seen.tokens_per_s is None else memory.tokens.seen(seen.tokens_per_s, seen.now_s)
    missed, whose = _missed(settings, seen), _who_lacks(settings, seen)
    shards = _learned(_shards(settings, memory.shards, tokens, seen), settings, missed if whose == "shards" else None)
    shard_memory, wanted_shards = _want(settings, shards, seen, missed)
    if settings.groups is None:
        return Memory(tokens, shard_memory, memory.groups), Decision(wanted_shards)
    groups = _learned(
        _groups(settings, settings.groups, memory.groups, seen), settings, missed if whose == "groups" else None
    )
    group_memory, wanted_groups = _want(settings, groups, seen, missed)
    return Memory(tokens, shard_memory, group_memory), Decision(wanted_shards, wanted_groups)


def _shards(settings: PolicySettings, memory: PoolMemory, tokens: Trend, seen: Observation) -> _Pool:
    fresh = [each for each in seen.shards if each.age_s <= settings.stale_s]
    silent, full, floor, load = len(seen.shards) - len(fresh), list[_Need](), 0, None
    if fresh:
        slots = max(1.0, sum(each.max_running for each in fresh) / len(fresh))
        requests = _sum([each.running + each.waiting for each in fresh], silent)
        kv = _sum([each.kv_use for each in fresh], silent)
        full += [
            _Need(
                requests / (slots * settings.full), f"{requests:.0f} requests, {slots:.0f} at once in each", "requests"
            ),
            _Need(kv / settings.full, f"KV of {kv:.1f} whole caches", "kv"),
        ]
        floor = max(math.ceil(_sum([each.running for each in fresh], silent) / slots), math.ceil(kv))
    needs = [*full]
    if seen.tokens_per_s is not None:
        load = max(tokens.level, seen.tokens_per_s)
        ahead = max(load, tokens.ahead(settings.join_s))
        coming = "" if ahead <= load else f" in {settings.join_s:.0f} s"
        if memory.too_much < math.inf:
            count = ahead / (memory.too_much * (1 - settings.margin))
            why = f"{ahead:.0f} tokens/s{coming}, {memory.too_much:.0f} in each were too many"
            needs.append(_Need(count, why, "tokens"))
    serving, whole = len(seen.shards), bool(fresh) and not silent and load is not None
    is_full = any(need.count > serving for need in full)
    return _Pool(
        settings.shards,
        memory,
        serving,
        seen.joining_shards,
        tuple(needs),
        floor,
        load,
        whole,
        is_full,
        tokens.is_settled,
    )


def _groups(settings: PolicySettings, limits: Limits, memory: PoolMemory, seen: Observation) -> _Pool:
    fresh: list[GroupLoad] = [each for each in seen.groups if each.age_s <= settings.stale_s]
    silent, needs, load = len(seen.groups) - len(fresh), [], None
    if fresh:
        load = _sum([each.busy for each in fresh], silent)
        target = min(settings.busy, memory.too_much * (1 - settings.margin))
        why = f"groups that are busy {100 * load / len(seen.groups):.0f} % of the time"
        needs.append(_Need(load / target, why, "busy"))
    return _Pool(limits, memory, len(seen.groups), seen.joining_groups, tuple(needs), 1, load, not silent)


def _sum(values: Sequence[float], silent: int) -> float:
    """Of all; who is silent may have as much as the busiest."""
    return sum(values) + silent * max(values)


def _missed(settings: PolicySettings, seen: Observation) -> _Missed | None:
    """The goal that is missed by most; None: none that is known."""
    goals = settings.goals
    known = (
        ("time to first token", seen.ttft, goals.ttft_p95_s), ("time per token", seen.tpot, goals.tpot_p95_s)
    )  # fmt: skip
    late = [
        _Missed(f"{name} p95 is {found.p95_s:.3g} s, the goal {goal_s:g} s", found.p95_s / goal_s)
        for name, found, goal_s in known
        if found is not None and found.age_s <= settings.stale_s and found.p95_s > goal_s
    ]
    return max(late, key=lambda each: each.times, default=None)


def _who_lacks(settings: PolicySettings, seen: Observation) -> str:
    """The pool that must grow where a goal is missed: what the time of the steps is spent on."""
    fresh: list[ShardLoad] = [each for each in seen.shards if each.age_s <= settings.stale_s]
    if settings.groups is None or not seen.groups or not fresh:
        return "shards"
    wait = sum(each.expert_wait for each in fresh) / len(fresh)
    if abs(wait - settings.bound) <= settings.tie:
        return "groups" if settings.groups.cost < settings.shards.cost else "shards"
    return "groups" if wait > settings.bound else "shards"


def _learned(pool: _Pool, settings: PolicySettings, missed: _Missed | None) -> _Pool:
    """With what this moment says of the load that is too much for one process."""
    if not pool.serving:
        return pool
    memory, needs, each = pool.memory, pool.needs, (pool.load or 0.0) / pool.serving
    if missed and not pool.joining:
        times = max(1 / (1 - settings.margin), min(missed.times, settings.most_times))
        needs = (*needs, _Need(pool.serving * times, f"the goal: {missed.reason}", "goal"))
    if (missed or pool.is_full) and not pool.joining and pool.is_settled and each > 0:
        memory = replace(memory, too_much=min(memory.too_much, each))
    elif not missed and not pool.is_full and each > memory.too_much:
        memory = replace(memory, too_much=each)  # it is not, any more
    return replace(pool, memory=memory, needs=needs)


def _want(
    settings: PolicySettings, pool: _Pool, seen: Observation, missed: _Missed | None
) -> tuple[PoolMemory, Wanted]:
    limits, have = pool.limits, pool.serving + pool.joining
    is_night = settings.is_night(seen.hour)
    fewest = limits.fewest_at_night if is_night else limits.fewest
    if have < fewest:
        return _grown(pool, seen), Wanted(fewest, f"{fewest} is the fewest{' at night' if is_night else ''}", "fewest")
    need = max(pool.needs, key=lambda each: each.count, default=None)
    if need is None:
        return replace(pool.memory, low_since_s=None), Wanted(have, "nothing is known of the load: it stays")
    wanted = math.ceil(need.count - 1e-9) + limits.standby
    if wanted > have:
        return _grow(settings, pool, seen, wanted, need)
    return _shrink(settings, pool, seen, max(fewest, pool.floor), missed)


def _grow(
    settings: PolicySettings, pool: _Pool, seen: Observation, wanted: int, need: _Need
) -> tuple[PoolMemory, Wanted]:
    limits, have = pool.limits, pool.serving + pool.joining
    memory = replace(pool.memory, low_since_s=None)
    if have >= limits.most:
        return memory, Wanted(have, f"{wanted} would be right for {need.reason}; {limits.most} is the most")
    if seen.now_s - memory.grew_s < settings.out_s:
        return memory, Wanted(have, f"{wanted} would be right for {need.reason}; it has just grown")
    count = min(wanted, have + max(limits.step_out, have), limits.most)
    return _grown(pool, seen), Wanted(count, f"{have} -> {count} for {need.reason}", need.cause)


def _grown(pool: _Pool, seen: Observation) -> PoolMemory:
    return replace(pool.memory, grew_s=seen.now_s, changed_s=seen.now_s, low_since_s=None)


def _shrink(
    settings: PolicySettings, pool: _Pool, seen: Observation, fewest: int, missed: _Missed | None
) -> tuple[PoolMemory, Wanted]:
    have, memory = pool.serving + pool.joining, pool.memory
    need = max(pool.needs, key=lambda each: each.count)
    enough = max(fewest, math.ceil(need.count * (1 + settings.hysteresis) - 1e-9) + pool.limits.standby)
    why_not = ""
    if have > pool.limits.most:
        enough = max(pool.floor, min(enough, pool.limits.most))
    elif enough >= have:
        why_not = f"right for {need.reason}"
    elif not pool.is_whole:
        why_not = "some numbers are missing or old: it does not shrink"
    elif missed:
        why_not = f"it does not shrink while {missed.reason}"
    elif pool.joining:
        why_not = "it does not shrink while processes join"
    if why_not or enough >= have:
        return replace(memory, low_since_s=None), Wanted(have, why_not or "requests hold what there is")
    since = memory.low_since_s if memory.low_since_s is not None else seen.now_s
    ready_s = max(since, memory.changed_s) + settings.in_s
    if seen.now_s < ready_s:
        waits = f"{enough} would be enough; it shrinks in {ready_s - seen.now_s:.0f} s"
        return replace(memory, low_since_s=since), Wanted(have, waits)
    count = max(enough, have - max(pool.limits.step_in, have // 10))
    reason = f"{have} -> {count}: {enough} are enough for {need.reason}"
    return replace(memory, changed_s=seen.now_s, low_since_s=None), Wanted(count, reason, need.cause)
