"""Placement: which expert group owns which expert (pure values, no I/O)."""

from moeray.placement.expert_map import Placement, PlacementError, contiguous

__all__ = ["Placement", "PlacementError", "contiguous"]
