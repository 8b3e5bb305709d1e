"""cluster.yaml's `autoscaling` as the policy's settings."""

from __future__ import annotations

from moeray.autoscaling import Goals, Limits, PolicySettings
from moeray.config import ClusterConfig, PoolScalingConfig

PUSH_S = 1.0
"""So often replicas say how they are (`metrics_interval_s` of Serve 2.60, whose default is 10 s)."""
POOLS = {"AttentionShard": "attention", "ExpertGroup": "experts", "Ingress": "ingress"}
"""Serve deployment -> pool."""


def policy_settings(config: ClusterConfig) -> PolicySettings:
    """What of a cluster is decided by a person."""
    scaling = config.autoscaling
    return PolicySettings(
        goals=Goals(scaling.ttft_p95_s, scaling.tpot_p95_s),
        shards=_limits(scaling.attention, config.attention.num_shards),
        groups=_limits(scaling.experts, config.num_remote_groups) if config.num_remote_groups else None,
        night=None if scaling.night is None else (scaling.night[0], scaling.night[1]),
        full=scaling.full,
        busy=scaling.busy,
        out_s=scaling.out_s,
        in_s=scaling.in_s,
        join_s=scaling.join_s,
    )


def _limits(pool: PoolScalingConfig, number: int) -> Limits:
    """A pool that is not scaled keeps its number."""
    if not pool.most:
        return Limits(number, number, number, cost=pool.cost_per_hour)
    return Limits(
        pool.fewest, pool.most, pool.fewest_at_night, pool.step_out, pool.step_in, pool.cost_per_hour, pool.standby
    )
