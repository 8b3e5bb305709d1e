"""Placement: which expert group owns which expert (pure values, no I/O)."""

from moeray.placement.expert_map import Placement, contiguous

__all__ = ["Placement", "contiguous"]
