"""What the controller is started with. Imports no ray: bad input is found before Ray is."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from moeray.config import ClusterConfig, ConfigError
from moeray.placement import Placement, PlacementError, contiguous

if TYPE_CHECKING:
    from moeray.deepseek_v4.shape import ModelShape
    from moeray.vllm_hooks.served_model import ServedModel

CONTROLLER_NAME = "moeray-controller"
NAMESPACE = "moeray"


@dataclass(frozen=True, slots=True)
class ControllerSettings:
    """The fixed facts of one cluster.

    Attributes:
        model: the served model name.
        num_groups: remote expert groups; 0 when experts stay in the shards.
        num_layers, num_experts: shape of the expert map.
        num_redundant: copies per layer beside the first ones.
        beat_s: how often a member says that it is alive.
        silence_s: a member that is silent for longer is lost. A closed connection is noticed at once, so this only
            catches hung processes and lost nodes; it is far above a beat so that load alone evicts nobody.
    """

    model: str
    num_groups: int
    num_layers: int
    num_experts: int
    beat_s: float = 1.0
    silence_s: float = 30.0
    num_redundant: int = 0

    def placement(self, generation: int) -> Placement:
        """The expert map: the same for the controller, which hands it to shards, and for a group, which loads by it.

        Raises:
            PlacementError: experts, groups and copies do not fit together.
        """
        return contiguous(
            generation=generation,
            num_layers=self.num_layers,
            num_experts=self.num_experts,
            num_groups=max(1, self.num_groups),
            num_redundant=self.num_redundant,
        )


def controller_settings(config: ClusterConfig, shape: ModelShape | ServedModel) -> ControllerSettings:
    """What the controller must know of model and topology.

    Raises:
        ConfigError: more expert groups than experts, or more redundant copies than the groups can hold.
    """
    num_groups = config.num_remote_groups
    if num_groups > shape.num_experts:
        raise ConfigError(
            f"experts.num_groups: {num_groups} groups cannot share the {shape.num_experts} routed experts "
            f"of {config.model}: at most {shape.num_experts}"
        )
    num_redundant = config.experts.num_redundant
    if num_redundant and not num_groups:
        raise ConfigError(
            f"experts.num_redundant: {num_redundant} copies need expert groups, but here experts stay in the shards "
            f"(experts.num_groups is {config.experts.num_groups}, transport.backend {config.transport.backend}): set 0"
        )
    settings = ControllerSettings(
        model=model_name(config), num_groups=num_groups, num_layers=shape.num_layers, num_experts=shape.num_experts,
        num_redundant=num_redundant,
    )  # fmt: skip
    try:
        if num_groups:
            settings.placement(generation=0)
    except PlacementError as error:
        raise ConfigError(f"experts.num_redundant: {error}") from error
    return settings


def model_name(config: ClusterConfig) -> str:
    """The name clients ask for: the bundled name or hub id as written, a directory's last part."""
    directory = Path(config.model).expanduser()
    return directory.resolve().name if directory.is_dir() else config.model
