"""A cluster in a few lines: what a policy's numbers do to the next observation."""

from __future__ import annotations

from dataclasses import dataclass, field

from moeray.autoscaling import Decision, GroupLoad, Memory, Observation, Percentile, PolicySettings, ShardLoad, decide

STEP_S = 5.0


@dataclass
class Plant:
    """Shards that manage `shard_tokens_s` each, and groups `group_tokens_s`; a process takes `join_s` to serve."""

    settings: PolicySettings
    shards: int = 1
    groups: int = 1
    shard_tokens_s: float = 1000.0
    group_tokens_s: float = 2000.0
    join_s: float = 40.0
    slots: int = 64
    now_s: float = 0.0
    hour: float = 12.0
    memory: Memory = field(default_factory=Memory)
    joining: list[tuple[float, str]] = field(default_factory=list)

    def observe(self, tokens_per_s: float) -> Observation:
        """Queueing at the slower of the two pools: a goal's time is missed from 90 % of what it manages on."""
        use, use_of_groups = tokens_per_s / (self.shards * self.shard_tokens_s), 0.0
        if self.settings.groups is not None:
            use_of_groups = tokens_per_s / (self.groups * self.group_tokens_s)
        worst = max(use, use_of_groups)
        slow = 1 / (1 - worst) if worst < 0.95 else 20.0
        running = min(self.slots, round(self.slots * 0.05 * slow))
        wait = use_of_groups / (use + use_of_groups)
        shard = ShardLoad(running, 0 if worst < 0.95 else 100, self.slots, min(1.0, 0.03 * slow), wait)
        goals = self.settings.goals
        return Observation(
            self.now_s, self.hour, (shard,) * self.shards, (GroupLoad(min(1.0, use_of_groups)),) * self.groups,
            self._number("shards"), self._number("groups"), tokens_per_s,
            Percentile(goals.ttft_p95_s * slow / 10), Percentile(goals.tpot_p95_s * slow / 10),
        )  # fmt: skip

    def step(self, tokens_per_s: float) -> Decision:
        """One decision, and what comes of it."""
        self.now_s += STEP_S
        for at, pool in [each for each in self.joining if each[0] <= self.now_s]:
            self.joining.remove((at, pool))
            setattr(self, pool, getattr(self, pool) + 1)
        self.memory, decision = decide(self.settings, self.memory, self.observe(tokens_per_s))
        self._apply("shards", decision.shards.count)
        if decision.groups is not None:
            self._apply("groups", decision.groups.count)
        return decision

    def _apply(self, pool: str, count: int) -> None:
        more = count - getattr(self, pool) - self._number(pool)
        self.joining += [(self.now_s + self.join_s, pool)] * max(0, more)
        if more < 0:
            assert not self._number(pool)
            setattr(self, pool, count)

    def _number(self, pool: str) -> int:
        return sum(each == pool for _, each in self.joining)
