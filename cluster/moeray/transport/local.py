"""The oracle: every group in this process. What it returns is what every other transport must return, to the bit."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from moeray.placement import Placement
from moeray.transport.errors import GroupFailed, TransportError
from moeray.transport.interface import DispatchHandle, ExpertCompute
from moeray.transport.reduction import require_finite, weighted_sum
from moeray.transport.rows import RowFormat


@dataclass(slots=True)
class LocalHandle:
    """The copied input of one dispatch."""

    generation: int
    layer: int
    x_TD: Tensor
    expert_ids_TK: Tensor
    weights_TK: Tensor
    spent: bool = False


class LocalTransport:
    """Calls `compute` once per group with the ids of that group alone, as a distant group would be called."""

    def __init__(
        self, placement: Placement, compute: ExpertCompute, shard: int = 0, rows: RowFormat | None = None
    ) -> None:
        """Args: rows: how they would travel to a distant group; None is as they are."""
        self._placement = placement
        self._compute = compute
        self._rows = rows
        self._owner_LE = torch.tensor(
            [placement.group_of_expert(layer, shard) for layer in range(placement.num_layers)]
        )

    @property
    def generation(self) -> int:
        return self._placement.generation

    def dispatch(self, layer: int, x_TD: Tensor, expert_ids_TK: Tensor, weights_TK: Tensor) -> LocalHandle:
        # The caller may reuse its buffers, and nothing is computed before combine (as with a distant group).
        x_TD = x_TD.clone() if self._rows is None else self._rows.decode(self._rows.encode(x_TD.clone()))
        return LocalHandle(self.generation, layer, x_TD, expert_ids_TK.clone(), weights_TK.clone())

    def combine(self, handle: DispatchHandle) -> Tensor:
        if not isinstance(handle, LocalHandle) or handle.spent:
            raise TransportError("combine needs a handle of this transport that was not combined before")
        handle.spent = True
        ids_TK = handle.expert_ids_TK
        owner_TK = self._owner_LE.to(ids_TK.device)[handle.layer][ids_TK.long()]
        rows_PD = handle.x_TD.new_empty((ids_TK.numel(), handle.x_TD.shape[1]))
        for group in range(self._placement.num_groups):
            mine_TK = owner_TK == group
            tokens = mine_TK.any(dim=1)
            own_ids_TK = torch.where(mine_TK, ids_TK, -1)[tokens]
            rows_PD[mine_TK.view(-1)] = self._call(group, handle.layer, handle.x_TD[tokens], own_ids_TK)
        y_TD = weighted_sum(rows_PD, handle.weights_TK)
        require_finite(y_TD, rows_PD, handle.layer, ids_TK, lambda: owner_TK.view(-1))
        return y_TD

    def _call(self, group: int, layer: int, x_TD: Tensor, expert_ids_TK: Tensor) -> Tensor:
        try:
            return self._compute(layer, x_TD, expert_ids_TK)
        except Exception as error:
            raise GroupFailed(group, f"{type(error).__name__}: {error}") from error

    def close(self) -> None:
        """Nothing to drop."""
