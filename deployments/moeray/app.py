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
from moeray.config import POOL_LABEL, ClusterConfig, load_config, parse_config
from moeray.controller.settings import ControllerSettings, controller_settings
from moeray.deepseek_v4.checkpoint import Checkpoint
from moeray.deepseek_v4.source import locate
from moeray.expert_group.replica import ExpertGroup
from moeray.ingress.replica import Ingress

APP_NAME = "moeray"


def build(config: ClusterConfig | Mapping[str, Any] | str | None = None) -> Application:
    """Wire controller, expert groups, attention shards and ingress of one cluster.

    Args:
        config: a checked configuration, the mapping of a cluster.yaml, a path to one, or None for the defaults.
    Raises:
        ConfigError, CheckpointError: before anything is started.
    """
    config = _checked(config)
    directory = locate(config.model)
    settings = controller_settings(config, Checkpoint.open(directory).shape)
    if settings.num_groups == 0:
        return _ingress(config, directory, settings, _shards(config, directory, settings))
    return _ingress(
        config, directory, settings, _shards(config, directory, settings), _groups(config, directory, settings)
    )


def _checked(config: ClusterConfig | Mapping[str, Any] | str | None) -> ClusterConfig:
    if isinstance(config, ClusterConfig):
        return config
    if config is None or isinstance(config, str):
        return load_config(Path(config) if config else None)
    return parse_config(config)


def _shards(config: ClusterConfig, directory: Path, settings: ControllerSettings) -> Application:
    attention = config.attention
    return serve.deployment(AttentionShard).options(
        num_replicas=attention.num_shards,
        max_ongoing_requests=1000,
        health_check_period_s=1,
        graceful_shutdown_timeout_s=10,
        ray_actor_options=_resources(attention.num_cpus, attention.num_gpus, attention.label_selector, "attention"),
    ).bind(config, str(directory), settings)  # fmt: skip


def _groups(config: ClusterConfig, directory: Path, settings: ControllerSettings) -> Application:
    experts = config.experts
    return serve.deployment(ExpertGroup).options(
        num_replicas=experts.num_groups,
        max_ongoing_requests=1000,
        health_check_period_s=1,
        graceful_shutdown_timeout_s=10,
        ray_actor_options=_resources(experts.num_cpus, experts.num_gpus, experts.label_selector, "experts"),
    ).bind(config, str(directory), settings)  # fmt: skip


def _ingress(config: ClusterConfig, directory: Path, settings: ControllerSettings, *pools: Application) -> Application:
    ingress = config.ingress
    return serve.deployment(Ingress).options(
        num_replicas=ingress.num_replicas,
        max_ongoing_requests=1000,
        health_check_period_s=1,
        graceful_shutdown_timeout_s=20,
        ray_actor_options=_resources(ingress.num_cpus, 0, ingress.label_selector, "ingress"),
    ).bind(config, str(directory), settings, *pools)  # fmt: skip


def _resources(num_cpus: float, num_gpus: float, selector: Mapping[str, str] | None, pool: str) -> dict[str, Any]:
    options: dict[str, Any] = {"num_cpus": num_cpus}
    if num_gpus:
        options["num_gpus"] = num_gpus
    if selector is None and any(node["Labels"].get(POOL_LABEL) == pool for node in ray.nodes() if node["Alive"]):
        selector = {POOL_LABEL: pool}
    if selector:
        options["label_selector"] = dict(selector)
    return options
