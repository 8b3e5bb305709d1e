"""What the controller is started with."""

from __future__ import annotations

from dataclasses import dataclass

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
