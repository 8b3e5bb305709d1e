"""One trace under one policy.

Time goes on in ticks. Shards are alike and the router keeps them equally full, so a pool is one queue in the order of
arrival and one set of running requests, all of which gain tokens at the same speed. A request that begins when each
running one has gained V tokens ends when they have gained V + its answer: ends are counted in an array over V, and a
tick costs the same for ten requests and for ten thousand. tests/unit/autoscaling compares with a simulation of single
requests.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from moeray.autoscaling.observation import GroupLoad, Observation, Percentile, ShardLoad
from moeray.autoscaling.simulator.service import Service
from moeray.autoscaling.simulator.traces import Floats, Trace

TICK_S = 0.25
WINDOW_S, RATE_WINDOW_S = 60.0, 20.0
"""Of what an ingress says of its clients, latencies and rates: see moeray.ingress.service_level."""
DECIDE_S = 5.0
HOUR = 3600.0


class Policy(Protocol):
    """Wants numbers of shards and groups; may remember."""

    def __call__(self, seen: Observation) -> tuple[int, int]: ...


@dataclass(frozen=True)
class Outcome:
    """Attributes:
    ttft_s, tpot_s: of each request; infinite where it had none by the end.
    at_s, shards, groups, running, waiting: over time, at each decision; processes that join are counted.
    shard_hours, group_hours: paid for, joining ones too.
    changes: of numbers.
    """

    ttft_s: Floats
    tpot_s: Floats
    at_s: Floats
    shards: Floats
    groups: Floats
    running: Floats
    waiting: Floats
    shard_hours: float
    group_hours: float
    changes: int

    def met(self, ttft_s: float, tpot_s: float) -> float:
        """Share of requests that met both goals."""
        return float(np.mean((self.ttft_s <= ttft_s) & (self.tpot_s <= tpot_s)))


@dataclass
class _Pool:
    """Processes of one role; those that join, by when they serve."""

    serving: int
    joining: list[tuple[float, int]]
    changes: int = 0
    hours: float = 0.0

    @property
    def joining_count(self) -> int:
        return sum(count for _, count in self.joining)

    def go_on(self, now_s: float, tick_s: float) -> bool:
        """Whether somebody has joined."""
        self.hours += (self.serving + self.joining_count) * tick_s / HOUR
        come = sum(count for at_s, count in self.joining if at_s <= now_s)
        if come:
            self.serving += come
            self.joining = [each for each in self.joining if each[0] > now_s]
        return come > 0

    def want(self, count: int, now_s: float, join_s: float) -> bool:
        """Start or stop; whether the number that serves has changed."""
        have = self.serving + self.joining_count
        if count > have:
            self.joining.append((now_s + join_s, count - have))
        elif count < have:
            left = have - count
            while left and self.joining:  # who has not come yet goes first
                at_s, coming = self.joining.pop()
                if coming > left:
                    self.joining.append((at_s, coming - left))
                left -= min(left, coming)
            self.serving -= left
        self.changes += count != have
        return count < have


class _Run:
    """The state of one simulation. V: tokens that a request has gained that runs since the beginning."""

    def __init__(self, trace: Trace, service: Service, shards: int, groups: int) -> None:
        self.trace, self.service = trace, service
        number = len(trace.arrival_s)
        self.kv_sum = np.concatenate([[0.0], np.cumsum(trace.prompt + trace.answer)])
        self.prompt_sum = np.concatenate([[0.0], np.cumsum(trace.prompt)])
        self.begun_s, self.begun_v = np.full(number, np.inf), np.full(number, np.inf)
        self.ending = np.zeros(1 << 16)
        self.ending_kv = np.zeros(1 << 16)
        self.v, self.arrived, self.admitted = 0.0, 0, 0
        self.running = self.kv = 0.0
        self.step_s, self.expert_share, self.busy, self.tpot_s = service.step_s(0.0, shards, groups)[0], 0.0, 0.0, 0.0
        self.late_prompt_s = 0.0
        self.v_curve: list[float] = []

    def tick(self, now_s: float, tick_s: float, shards: int, groups: int) -> None:
        """From `now_s` on: admit, decode, end."""
        service, end_s = self.service, now_s + tick_s
        self.arrived = int(np.searchsorted(self.trace.arrival_s, end_s, side="right"))
        leaving = self.ending[int(self.v) + 1 : int(self.v + tick_s / (self.tpot_s or self.step_s)) + 1].sum()
        before = self.admitted
        spent = self._admit(now_s, tick_s, shards, leaving)
        at_half = self.running - (self.admitted - before + leaving) / 2  # who comes or goes does so within the tick
        self.step_s, self.expert_share, self.busy = service.step_s(max(0.0, at_half), shards, groups)
        share = min(service.prompt_share, spent / (tick_s * shards))
        self.tpot_s = self.step_s / (1 - share)
        first, self.v = int(self.v), self.v + tick_s / self.tpot_s
        last = int(self.v)
        if last > first:
            self.running -= self.ending[first + 1 : last + 1].sum()
            self.kv -= self.ending_kv[first + 1 : last + 1].sum()
        self.v_curve.append(self.v)

    def _admit(self, now_s: float, tick_s: float, shards: int, leaving: float) -> float:
        """Those for whom there are places, KV and time for their prompts; the shards' seconds that prompts took.

        Args:
            leaving: requests whose places become free meanwhile.
        """
        service, first = self.service, self.admitted
        budget = service.prompt_share * tick_s * shards
        room = max(0, int(service.places * shards - self.running + leaving))
        by_kv = int(
            np.searchsorted(self.kv_sum, self.kv_sum[first] + service.kv_tokens * shards - self.kv, side="right")
        )
        can = max(0.0, budget - self.late_prompt_s) / service.prompt_token_s
        by_time = int(np.searchsorted(self.prompt_sum, self.prompt_sum[first] + can, side="right"))
        if self.late_prompt_s < budget:  # the last one's prompt may go on in the next tick
            by_time += 1
        last = max(first, min(self.arrived, first + room, by_kv - 1, by_time - 1))
        work = self.late_prompt_s + (self.prompt_sum[last] - self.prompt_sum[first]) * service.prompt_token_s
        spent = min(budget, work)
        self.late_prompt_s = float(work - spent)
        if last > first:
            self._begin(first, last, now_s, tick_s, shards)
        return float(spent)

    def _begin(self, first: int, last: int, now_s: float, tick_s: float, shards: int) -> None:
        new = slice(first, last)
        trace, service = self.trace, self.service
        start = np.maximum(trace.arrival_s[new], now_s)
        prompt_s = trace.prompt[new] * service.prompt_token_s
        ahead = self.late_prompt_s / shards
        self.begun_s[new] = start + prompt_s / service.prompt_share + ahead + self.step_s
        self.begun_v[new] = self.v + (start - now_s) / self.step_s
        ends = np.round(self.begun_v[new] + trace.answer[new]).astype(np.int64)
        if ends.max() >= len(self.ending):
            grown = max(2 * len(self.ending), int(ends.max()) + 1)
            for name in ("ending", "ending_kv"):
                setattr(self, name, np.concatenate([getattr(self, name), np.zeros(grown - len(getattr(self, name)))]))
        np.add.at(self.ending, ends, 1.0)
        np.add.at(self.ending_kv, ends, trace.prompt[new] + trace.answer[new])
        self.running += last - first
        self.kv += self.kv_sum[last] - self.kv_sum[first]
        self.admitted = last

    def seen(
        self, now_s: float, changed_s: float, shards: _Pool, groups: _Pool, tpots: NDArray[np.float64]
    ) -> Observation:
        """As replicas and ingresses say it."""
        since = max(changed_s, now_s - WINDOW_S)
        begun = self.begun_s[: self.admitted]
        low = int(np.searchsorted(self.trace.arrival_s, since - 600.0))  # who came before that is not in the window
        recent = begun[low:]
        shown = (recent >= since) & (recent <= now_s)
        ttft = recent[shown] - self.trace.arrival_s[low : self.admitted][shown]
        window = min(RATE_WINDOW_S, now_s) or 1.0
        came = int(np.searchsorted(self.trace.arrival_s, now_s - window))
        asked = (self.kv_sum[self.arrived] - self.kv_sum[came]) / window
        waiting = self.arrived - self.admitted
        shard = ShardLoad(
            running=round(self.running / shards.serving), waiting=round(waiting / shards.serving),
            max_running=self.service.places, kv_use=min(1.0, self.kv / (self.service.kv_tokens * shards.serving)),
            expert_wait=self.expert_share,
        )  # fmt: skip
        return Observation(
            now_s=now_s, hour=now_s / HOUR % 24, shards=(shard,) * shards.serving,
            groups=(GroupLoad(self.busy),) * groups.serving, joining_shards=shards.joining_count,
            joining_groups=groups.joining_count, tokens_per_s=float(asked),
            ttft=Percentile(float(np.percentile(ttft, 95))) if len(ttft) else None,
            tpot=Percentile(float(np.percentile(tpots, 95))) if self.running and len(tpots) else None,
        )  # fmt: skip


def simulate(
    trace: Trace, service: Service, policy: Policy, *, shards: int, groups: int, tick_s: float = TICK_S
) -> Outcome:
    """The whole trace.

    Args:
        shards, groups: that serve at the beginning.
    """
    run, pools = _Run(trace, service, shards, groups), (_Pool(shards, []), _Pool(groups, []))
    rows, tpots, changed_s = list[tuple[float, ...]](), list[float](), 0.0
    every = round(DECIDE_S / tick_s)
    for number in range(round(trace.length_s / tick_s)):
        now_s = number * tick_s
        if True in [pool.go_on(now_s, tick_s) for pool in pools]:
            changed_s, tpots = now_s, []
        run.tick(now_s, tick_s, pools[0].serving, pools[1].serving)
        tpots.append(run.tpot_s)
        if number % every:
            continue
        recent = np.array(tpots[-round(WINDOW_S / tick_s) :])
        wanted = policy(run.seen(now_s + tick_s, changed_s, *pools, recent))
        if True in [pool.want(count, now_s, service.join_s) for pool, count in zip(pools, wanted, strict=True)]:
            changed_s, tpots = now_s, []
        counts = [pool.serving + pool.joining_count for pool in pools]
        rows.append((now_s, *counts, run.running, run.arrived - run.admitted))
    return _outcome(trace, run, pools, np.array(rows), tick_s)


def _outcome(trace: Trace, run: _Run, pools: tuple[_Pool, _Pool], rows: Floats, tick_s: float) -> Outcome:
    """Ends are read off the curve of V."""
    at = np.arange(1, len(run.v_curve) + 1) * tick_s
    v = np.array(run.v_curve)
    ended_v = run.begun_v + trace.answer  # infinite where nothing began
    ended_s = np.interp(np.minimum(ended_v, v[-1]), v, at)
    tpot = np.where(
        ended_v <= v[-1], (ended_s - np.interp(np.minimum(run.begun_v, v[-1]), v, at)) / trace.answer, np.inf
    )
    at_s, shards, groups, running, waiting = rows.T
    return Outcome(
        run.begun_s - trace.arrival_s, tpot, at_s, shards, groups, running, waiting, pools[0].hours, pools[1].hours,
        pools[0].changes + pools[1].changes,
    )  # fmt: skip
