"""What replicas push to Ray Serve, as one observation of the cluster.

Each replica answers `record_autoscaling_stats` with the numbers named here; Serve's controller keeps them with their
times. A replica that has not answered yet counts as one of whom nothing is known.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

from moeray.autoscaling import GroupLoad, Observation, Percentile, ShardLoad

SHARD = ("running", "waiting", "max_running", "kv_use", "expert_wait")
"""Of an attention shard; see `moeray.autoscaling.ShardLoad`."""
GROUP = ("busy",)
"""Of an expert group."""
INGRESS = ("tokens_per_s", "ttft_p95_s", "tpot_p95_s")
"""Of an ingress. A latency that nobody had is left out."""

_UNKNOWN = ShardLoad(running=0, waiting=0, max_running=1, kv_use=0.0, expert_wait=0.0, age_s=math.inf)


class Sample(Protocol):
    """Serve's TimeStampedValue: seconds since 1970, and a number."""

    timestamp: float
    value: float


class Context(Protocol):
    """The part of Serve's AutoscalingContext that is read."""

    running_replicas: Sequence[Any]
    target_num_replicas: int
    raw_metrics: Mapping[str, Mapping[Any, Sequence[Sample]]] | None


def observed(
    shards: Context, groups: Context | None, ingresses: Context, *, now_s: float, time_s: float, hour: float
) -> Observation:
    """One moment.

    Args:
        groups: None where the model is not split.
        now_s: of a clock that never goes back.
        time_s: since 1970, of the clock that the samples bear.
        hour: of the users' day.
    """
    of_shards = [_shard(*each) for each in _latest(shards, SHARD, time_s)]
    of_groups = [] if groups is None else [_group(*each) for each in _latest(groups, GROUP, time_s)]
    fronts = list(_latest(ingresses, INGRESS, time_s))
    rates = [values.get("tokens_per_s") for values, _ in fronts]
    known = [rate for rate in rates if rate is not None]
    return Observation(
        now_s=now_s,
        hour=hour,
        shards=tuple(of_shards),
        groups=tuple(of_groups),
        joining_shards=_joining(shards),
        joining_groups=0 if groups is None else _joining(groups),
        tokens_per_s=sum(known) if known and len(known) == len(rates) else None,
        ttft=_worst(fronts, "ttft_p95_s"),
        tpot=_worst(fronts, "tpot_p95_s"),
    )


def _latest(context: Context, names: Sequence[str], time_s: float) -> Iterator[tuple[dict[str, float], float]]:
    """Of each running replica what it said last, and how old the oldest of that is (infinitely, if it said nothing)."""
    metrics = context.raw_metrics or {}
    for replica in context.running_replicas:
        found = {name: metrics[name][replica][-1] for name in names if metrics.get(name, {}).get(replica)}
        age_s = max((time_s - sample.timestamp for sample in found.values()), default=math.inf)
        yield {name: sample.value for name, sample in found.items()}, max(0.0, age_s)


def _shard(values: Mapping[str, float], age_s: float) -> ShardLoad:
    if any(name not in values for name in SHARD):
        return _UNKNOWN
    return ShardLoad(
        running=int(values["running"]),
        waiting=int(values["waiting"]),
        max_running=int(values["max_running"]),
        kv_use=values["kv_use"],
        expert_wait=values["expert_wait"],
        age_s=age_s,
    )


def _group(values: Mapping[str, float], age_s: float) -> GroupLoad:
    return GroupLoad(values["busy"], age_s) if "busy" in values else GroupLoad(0.0, math.inf)


def _joining(context: Context) -> int:
    return max(0, context.target_num_replicas - len(context.running_replicas))


def _worst(fronts: Sequence[tuple[Mapping[str, float], float]], name: str) -> Percentile | None:
    """The ingress whose clients wait longest: they are clients, too."""
    found = [Percentile(values[name], age_s) for values, age_s in fronts if name in values]
    return max(found, key=lambda each: each.p95_s, default=None)
