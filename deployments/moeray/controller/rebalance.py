"""From what the groups report to a better placement: load in, proposal out."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import ray

from moeray.membership import Membership, MembershipError
from moeray.placement import Layout, Placement, apart
from moeray.placement.balance import Rows, arrange, imbalance, num_moves

logger = logging.getLogger(__name__)

WORTH_IT = 0.1
"""A placement must make the busiest group's work so much nearer to the mean (both in units of the mean)."""
ROWS_PER_EXPERT = 16
"""Fewer rows than this per expert and layer are no load to plan by."""


class LoadWindow:
    """Rows per layer and expert since `begin`, from counters that groups report."""

    def __init__(self) -> None:
        self._before: dict[str, dict[int, list[int]]] = {}

    def begin(self, reports: Mapping[str, Mapping[str, Any]]) -> None:
        self._before = {id: _counters(report) for id, report in reports.items()}

    def rows(self, reports: Mapping[str, Mapping[str, Any]], layout: Layout) -> list[list[float]]:
        """[L][E]; a group that came meanwhile counts from zero."""
        rows_LE = [[0.0] * layout.num_experts for _ in range(layout.num_layers)]
        for id, report in reports.items():
            before = self._before.get(id, {})
            for layer, counts in _counters(report).items():
                earlier = before.get(layer, [0] * len(counts))
                for expert, count in enumerate(counts):
                    rows_LE[layer][expert] += max(0, count - earlier[expert])
        return rows_LE


def _counters(report: Mapping[str, Any]) -> dict[int, list[int]]:
    experts = report.get("experts") or {}
    return {int(layer): list(counts) for layer, counts in (experts.get("tokens_per_layer") or {}).items()}


async def rebalance(
    period_s: float,
    layout: Layout,
    state: Callable[[], Membership],
    reports: Callable[[], Mapping[str, Mapping[str, Any]]],
    propose: Callable[[Placement, int], None],
) -> None:
    """Every period, for ever: place copies anew by the rows of that time, if it is worth the moves.

    Args:
        propose: `(placement, generation it is based on)`; raises MembershipError if that is not in force any more.
    """
    window = LoadWindow()
    while True:
        window.begin(reports())
        await asyncio.sleep(period_s)
        current = state().current
        if current.placement is None or not state().is_settled:
            continue
        try:
            nodes = [state().members[id].node for id in current.groups if id in state().members]
            better = await find_better(layout, current.placement, window.rows(reports(), layout), nodes)
            if better is not None:
                propose(better, current.number)
        except (ray.exceptions.RayError, MembershipError) as error:
            logger.warning("copies stay where they are: %s", error)


async def find_better(layout: Layout, placement: Placement, rows_LE: Rows, node_G: Sequence[str]) -> Placement | None:
    """A placement for the same groups that is worth the moves, or None. Computed in a process of its own.

    Args:
        node_G: [G] where each group runs.
    Raises:
        ray.exceptions.RayError: that process failed.
    """
    busy = [rows_E for rows_E in rows_LE if sum(rows_E) >= ROWS_PER_EXPERT * layout.num_experts]
    if not busy or placement.num_groups < 2 or len(node_G) < placement.num_groups:
        return None
    found: Placement | None = await ray.remote(num_cpus=0, max_retries=0)(better_placement).remote(
        layout, placement, rows_LE, node_G
    )
    return found


def better_placement(layout: Layout, placement: Placement, rows_LE: Rows, node_G: Sequence[str]) -> Placement | None:
    """See `find_better`. How many copies an expert gets is decided by vLLM's EPLB policy, where that is free."""
    copies_LE = None
    num_slots = layout.num_slots(placement.num_groups)
    if num_slots > layout.num_experts * layout.num_copies(placement.num_groups)[0]:
        from moeray.vllm_hooks.expert_copies import expert_copies

        copies_LE = expert_copies(rows_LE, num_slots)
    stay = list(range(placement.num_groups))
    # A layer without experts, or without load, is equal as it is.
    weights_LE = [rows_E if any(rows_E) else [1.0] * layout.num_experts for rows_E in rows_LE]
    if copies_LE is not None:
        copies_LE = [
            copies_E if any(rows_E) else list(placement.num_copies(layer))
            for layer, (copies_E, rows_E) in enumerate(zip(copies_LE, rows_LE, strict=True))
        ]
    better = arrange(layout, placement.generation, stay, placement, rows_LE=weights_LE, copies_LE=copies_LE)
    better = apart(better, node_G)
    before, after = imbalance(placement, rows_LE), imbalance(better, rows_LE)
    logger.info("load: busiest group over mean %.2f, could be %.2f", before, after)
    if before - after < WORTH_IT or not num_moves(better, stay, placement):
        return None
    return better
