"""What the controller is started with. Imports no ray: bad input is found before Ray is."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from moeray.config import ClusterConfig, ConfigError

if TYPE_CHECKING:
    from moeray.deepseek_v4.shape import ModelShape

CONTROLLER_NAME = "moeray-controller"
NAMESPACE = "moeray"


@dataclass(frozen=True, slots=True)
class ControllerSettings:
    """The fixed facts of one cluster.

    Attributes:
        model: the served model name.
        num_groups: remote expert groups; 0 when experts stay in the shards.
        num_layers, num_experts: shape of the expert map.
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


def controller_settings(config: ClusterConfig, shape: ModelShape) -> ControllerSettings:
    """What the controller must know of model and topology.

    Raises:
        ConfigError: more expert groups than experts.
    """
    num_groups = config.num_remote_groups
    if num_groups > shape.num_experts:
        raise ConfigError(
            f"experts.num_groups: {num_groups} groups cannot share the {shape.num_experts} routed experts "
            f"of {config.model}: at most {shape.num_experts}"
        )
    return ControllerSettings(
        model=model_name(config), num_groups=num_groups, num_layers=shape.num_layers, num_experts=shape.num_experts
    )


def model_name(config: ClusterConfig) -> str:
    """The name clients ask for: the bundled name or hub id as written, a directory's last part."""
    directory = Path(config.model).expanduser()
    return directory.resolve().name if directory.is_dir() else config.model
