"""Placement: which expert group owns which expert, which process which cores (pure but for machine.py)."""

from moeray.placement.apart import apart, together
from moeray.placement.balance import Layout, arrange
from moeray.placement.cores import CoreShare, Cpu, Machine, Wanted, crowded, take_cores
from moeray.placement.expert_map import NOWHERE, Placement, PlacementError, contiguous

__all__ = [
    "NOWHERE",
    "CoreShare",
    "Cpu",
    "Layout",
    "Machine",
    "Placement",
    "PlacementError",
    "Wanted",
    "apart",
    "arrange",
    "contiguous",
    "crowded",
    "take_cores",
    "together",
]
