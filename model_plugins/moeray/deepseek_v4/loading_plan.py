"""Which bytes each expert group of a placement reads, known before anything is read."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from moeray.deepseek_v4.checkpoint import Checkpoint
from moeray.deepseek_v4.names import PARTS
from moeray.placement import Placement, PlacementError


@dataclass(frozen=True, slots=True)
class GroupLoad:
    """What one expert group reads.

    Attributes:
        num_experts: routed experts over all layers.
        num_bytes: as stored, scales included.
        value_bytes: of the same experts as values of two bytes each: what a group on CPU holds of quantised experts.
        num_runs: runs of adjacent bytes.
        num_files: weight files with any of them.
    """

    group: int
    num_experts: int
    num_bytes: int
    value_bytes: int
    num_runs: int
    num_files: int


def plan_loading(checkpoint: Checkpoint, placement: Placement) -> tuple[GroupLoad, ...]:
    """[N] the load of every group, in group order.

    Raises:
        CheckpointError: an expert is missing or in an unknown format.
        PlacementError: the placement is of another model.
    """
    shape = checkpoint.shape
    planned, stored = (f"{each.num_layers} layers of {each.num_experts} experts" for each in (placement, shape))
    if planned != stored:
        raise PlacementError(f"the placement has {planned}, but {checkpoint.path} has {stored}")
    return tuple(_load_of(checkpoint, placement, group) for group in range(placement.num_groups))


def _load_of(checkpoint: Checkpoint, placement: Placement, group: int) -> GroupLoad:
    num_experts = value_bytes = 0
    ranges = []
    for layer in checkpoint.shape.moe_layers:
        for expert in placement.experts_of_group(group, layer):
            num_experts += 1
            for part in PARTS:
                matrix = checkpoint.expert_matrix(layer, expert, part)
                value_bytes += 2 * matrix.num_values
                ranges += [(tensor.file, tensor.offset, tensor.num_bytes) for tensor in matrix.tensors]
    ranges.sort()
    ends = Counter((file, offset + num_bytes) for file, offset, num_bytes in ranges)
    adjacent = sum((file, offset) in ends for file, offset, _ in ranges)
    return GroupLoad(
        group=group,
        num_experts=num_experts,
        num_bytes=sum(num_bytes for _, _, num_bytes in ranges),
        value_bytes=value_bytes,
        num_runs=len(ranges) - adjacent,
        num_files=len({file for file, _, _ in ranges}),
    )
