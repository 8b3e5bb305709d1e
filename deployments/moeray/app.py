"""build(config) -> Serve application: the only wiring of the cluster's pools.

Serve: `import_path: moeray.app:build`, its `args` being the mapping of cluster.yaml.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ray
from ray import serve
from ray.serve import Application

from moeray.attention_shard.replica import AttentionShard
from moeray.autoscaler.settings import PUSH_S
from moeray.config import (
    POOL_LABEL,
    AttentionConfig,
    ClusterConfig,
    EngramConfig,
    ExpertsConfig,
    IngressConfig,
    load_config,
    parse_config,
    to_dict,
)
from moeray.controller.settings import controller_settings
from moeray.deepseek_v4.checkpoint import Checkpoint
from moeray.deepseek_v4.source import locate
from moeray.engram_server.replica import EngramServer
from moeray.engram_server.topology import check_row_servers
from moeray.expert_group.replica import ExpertGroup
from moeray.ingress.replica import Ingress
from moeray.vllm_hooks.served_model import ExpertsIn, describe_model, experts_in

APP_NAME = "moeray"
Asks = AttentionConfig | ExpertsConfig | EngramConfig | IngressConfig
"""What a pool asks of its nodes is in its part of the configuration."""

DRAIN_S = 150.0
"""What Serve leaves a replica that it stops: a group until the others have its experts, a shard for its requests. Those
that are not needed leave at once."""
INGRESS_STOP_S = 20.0
"""What it leaves an ingress beside `ingress.drain_s`."""


def build(config: ClusterConfig | Mapping[str, Any] | str | None = None) -> Application:
    """Wire controller, expert groups, attention shards, Engram row servers and ingress of one cluster.

    Args:
        config: a checked configuration, the mapping of a cluster.yaml, a path to one, or None for the defaults.
    Raises:
        ConfigError, CheckpointError: before anything is started.
    """
    config = _checked(config)
    directory = locate(config.model)
    described = describe_model(directory)
    checkpoint = None if experts_in(config, described) is ExpertsIn.VLLM else Checkpoint.open(directory)
    settings = controller_settings(config, described if checkpoint is None else checkpoint.shape)
    check_row_servers(config, checkpoint)
    # A directory is the same path on every node; a bundled model or a hub id is found by each node for itself.
    model = str(directory) if Path(config.model).expanduser().is_dir() else config.model
    arguments = (config, model, settings)
    attention, experts, engram, ingress = config.attention, config.experts, config.engram, config.ingress
    pools = [_scaled(config, _pool(AttentionShard, "attention", attention.num_shards, attention)).bind(*arguments)]
    if settings.num_groups:
        pools.append(_scaled(config, _pool(ExpertGroup, "experts", experts.num_groups, experts)).bind(*arguments))
    if engram.num_servers:
        servers = _pool(EngramServer, "engram", engram.num_servers, engram)
        if engram.max_servers_per_node:
            servers = servers.options(max_replicas_per_node=engram.max_servers_per_node)
        pools.append(servers.bind(*arguments))
    front = _scaled(config, _pool(Ingress, "ingress", ingress.num_replicas, ingress))
    return front.bind(*arguments, *pools)


def autoscaling_policy(config: ClusterConfig) -> dict[str, Any] | None:
    """`autoscaling_policy` of this application's Serve configuration; None: numbers are as written."""
    if not config.autoscaling.is_on:
        return None
    return {
        "policy_function": "moeray.autoscaler.serve_policy:ServePolicy",
        "policy_kwargs": {"config": to_dict(config)},
    }


def _scaled(config: ClusterConfig, deployment: Any) -> Any:
    """Under the policy where there is one; all three pools, for it hears only of those. Delays are the policy's.

    Serve's default would count requests that never pass through Serve, and stop everybody.
    """
    if not config.autoscaling.is_on:
        return deployment
    number = deployment.num_replicas
    limits = {"AttentionShard": config.autoscaling.attention, "ExpertGroup": config.autoscaling.experts}
    limit = limits.get(deployment.name)
    fewest, most = (limit.fewest_at_night, limit.most) if limit is not None and limit.most else (number, number)
    return deployment.options(
        num_replicas="auto",
        autoscaling_config={
            "min_replicas": fewest, "max_replicas": most, "initial_replicas": number,
            "upscale_delay_s": 0.0, "downscale_delay_s": 0.0, "metrics_interval_s": PUSH_S,
            "policy": {"policy_function": "moeray.autoscaler.serve_policy:hold"},
        },
    )  # fmt: skip


def _checked(config: ClusterConfig | Mapping[str, Any] | str | None) -> ClusterConfig:
    if isinstance(config, ClusterConfig):
        return config
    if config is None or isinstance(config, str):
        return load_config(Path(config) if config else None)
    return parse_config(config)


def _pool(replica: type, pool: str, num_replicas: int, asks: Asks) -> Any:
    """One Serve deployment; tokens never pass through it, so Serve's own queue and limits are of no matter."""
    return serve.deployment(replica).options(
        num_replicas=num_replicas,
        max_ongoing_requests=1000,
        health_check_period_s=1,
        graceful_shutdown_timeout_s=asks.drain_s + INGRESS_STOP_S if isinstance(asks, IngressConfig) else DRAIN_S,
        graceful_shutdown_wait_loop_s=0.1,  # requests that Serve knows of are health checks: draining is ours
        ray_actor_options={
            "num_cpus": asks.num_cpus,
            "num_gpus": getattr(asks, "num_gpus", 0),
            "label_selector": _selector(asks.label_selector, pool),
        },
    )


def _selector(wanted: Mapping[str, str] | None, pool: str) -> dict[str, str]:
    """The labels that this pool's nodes must carry: as configured, or `pool=...` if any living node has it."""
    if wanted is not None:
        return dict(wanted)
    there = {node["Labels"].get(POOL_LABEL) for node in ray.nodes() if node["Alive"]}
    if pool == "ingress" and pool not in there:
        pool = "attention"  # next to the shards, where no node is set apart for it
    return {POOL_LABEL: pool} if pool in there else {}
