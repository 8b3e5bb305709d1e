"""What the controller is started with. Imports no ray: bad input is found before Ray is."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from moeray.config import ClusterConfig, ClusterTlsConfig, ConfigError, TelemetryConfig
from moeray.membership import Delays
from moeray.placement import Layout, PlacementError, contiguous

if TYPE_CHECKING:
    from moeray.deepseek_v4.shape import ModelShape
    from moeray.vllm_hooks.served_model import ServedModel

CONTROLLER_NAME = "moeray-controller"
NAMESPACE = "moeray"


GONE_TIMES = 3
"""A process that hangs ends itself after `health.hang_s`; one that is silent for so many times as long is gone."""


@dataclass(frozen=True, slots=True)
class ControllerSettings:
    """The facts of one cluster. Replicas get them too, and must use nothing of it that scaling changes.

    Attributes:
        model: the served model name.
        num_groups: remote expert groups to begin with; 0 when experts stay in the shards.
        layout: what of the model is placed.
        delays: how long membership waits for what.
        rebalance_s: how often copies are placed anew by load; 0 is never.
        redis_url: where the state is kept; empty is Ray's own store.
        beat_s: how often a member says that it is alive.
        hang_s: when the controller itself counts as hung.
        cluster_tls: encrypts leases.
        telemetry: where each process shows its metrics.
    """

    model: str
    num_groups: int
    layout: Layout
    delays: Delays = field(default_factory=Delays)
    rebalance_s: float = 0.0
    redis_url: str = ""
    beat_s: float = 1.0
    hang_s: float = 10.0
    cluster_tls: ClusterTlsConfig = field(default_factory=ClusterTlsConfig)
    telemetry: TelemetryConfig = field(default_factory=TelemetryConfig)

    @property
    def silence_s(self) -> float:
        """A member that is silent for longer, or has not come back to a restarted controller by then, is lost.

        A closed connection is noticed at once, and a hung process ends itself, so this only catches lost nodes; it is
        far above a beat so that load alone evicts nobody.
        """
        return GONE_TIMES * self.hang_s


def controller_settings(config: ClusterConfig, shape: ModelShape | ServedModel) -> ControllerSettings:
    """What the controller must know of model and topology.

    Raises:
        ConfigError: more expert groups than experts, or copies that the groups or the slots cannot hold.
    """
    experts, num_groups = config.experts, config.num_remote_groups
    if num_groups > shape.num_experts:
        raise ConfigError(
            f"experts.num_groups: {num_groups} groups cannot share the {shape.num_experts} routed experts "
            f"of {config.model}: at most {shape.num_experts}"
        )
    _check_copies(config, shape.num_experts)
    return ControllerSettings(
        model=model_name(config), num_groups=num_groups,
        layout=Layout(shape.num_layers, shape.num_experts, experts.num_redundant, experts.min_copies),
        delays=Delays(join_debounce_s=experts.join_debounce_s, regroup_s=experts.regroup_s),
        rebalance_s=experts.rebalance_s if num_groups else 0.0, redis_url=config.redis.url,
        hang_s=config.health.hang_s, cluster_tls=config.cluster_tls, telemetry=config.telemetry,
    )  # fmt: skip


def _check_copies(config: ClusterConfig, num_experts: int) -> None:
    experts, num_groups = config.experts, config.num_remote_groups
    for key, count in (("num_redundant", experts.num_redundant), ("min_copies", experts.min_copies - 1)):
        if count and not num_groups:
            raise ConfigError(
                f"experts.{key}: {getattr(experts, key)} copies need expert groups, but here experts stay in the "
                f"shards (experts.num_groups is {experts.num_groups}, transport.backend {config.transport.backend}): "
                f"set {getattr(experts, key) - count}"
            )
    if not num_groups:
        return
    if experts.min_copies > num_groups:
        raise ConfigError(
            f"experts.min_copies: {experts.min_copies} copies of each expert need as many expert groups, "
            f"but experts.num_groups is {num_groups}"
        )
    needed = num_experts * (experts.min_copies - 1)
    if experts.num_redundant < needed:
        raise ConfigError(
            f"experts.min_copies: {experts.min_copies} copies of {num_experts} experts take {needed} redundant slots "
            f"per layer, but experts.num_redundant is {experts.num_redundant}"
        )
    try:
        contiguous(generation=0, num_layers=0, num_experts=num_experts, num_groups=num_groups,
                   num_redundant=experts.num_redundant)  # fmt: skip
    except PlacementError as error:
        raise ConfigError(f"experts.num_redundant: {error}") from error


def model_name(config: ClusterConfig) -> str:
    """The name clients ask for: the bundled name or hub id as written, a directory's last part."""
    directory = Path(config.model).expanduser()
    return directory.resolve().name if directory.is_dir() else config.model
