"""What is known of a cluster at one moment."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class ShardLoad:
    """One attention shard that serves.

    Attributes:
        running: requests that are computed.
        waiting: requests in its queue.
        max_running: requests that it computes at once.
        kv_use: share of its KV cache that running requests hold, 0..1.
        expert_wait: share of its steps' time that it waited for expert groups, 0..1.
        age_s: since it said so.
    """

    running: int
    waiting: int
    max_running: int
    kv_use: float
    expert_wait: float
    age_s: float = 0.0


@dataclass(frozen=True, slots=True)
class GroupLoad:
    """One expert group that serves. `busy`: share of the time in which it computed, 0..1; `age_s` as of a shard."""

    busy: float
    age_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Percentile:
    """The 95th percentile of a latency, of requests since the numbers of processes changed last; seconds."""

    p95_s: float
    age_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Observation:
    """One moment.

    Attributes:
        now_s: of a clock that never goes back.
        hour: of the day where the cluster's users are, 0..24.
        shards: all that serve.
        groups: all that serve; none where the model is not split.
        joining_shards: started, but not serving yet.
        joining_groups: the same of groups.
        tokens_per_s: prompt tokens that are not cached, and tokens to generate, of the requests that arrive, refused
            ones too; None if nobody knows.
        ttft: to the first token; None if there was none.
        tpot: between later tokens; None if there was none.
    """

    now_s: float
    hour: float
    shards: tuple[ShardLoad, ...]
    groups: tuple[GroupLoad, ...] = ()
    joining_shards: int = 0
    joining_groups: int = 0
    tokens_per_s: float | None = None
    ttft: Percentile | None = None
    tpot: Percentile | None = None
