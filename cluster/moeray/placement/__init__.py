"""Placement: which expert group owns which expert, which process which cores (pure but for machine.py)."""

from moeray.placement.cores import CoreShare, Cpu, Machine, Wanted, crowded, take_cores
from moeray.placement.expert_map import Placement, PlacementError, contiguous

__all__ = [
    "CoreShare",
    "Cpu",
    "Machine",
    "Placement",
    "PlacementError",
    "Wanted",
    "contiguous",
    "crowded",
    "take_cores",
]
