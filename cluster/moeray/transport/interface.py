"""The one shape every transport has: dispatch routed tokens, combine weighted rows.

Tensor suffixes: T tokens of this step, D hidden size, K experts per token (top-k), P (token, k) pairs.

The reduction happens at the attention shard, in fp32, in the order k = 0..K-1 for every token, over rows
that an expert computed from that shard's tokens alone. Nothing in it depends on how many groups there are or
where an expert lives, so the result is bit-equal for every transport, group count and placement.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from torch import Tensor

ExpertCompute = Callable[[int, Tensor, Tensor], Tensor]
"""`compute(layer, x_TD, expert_ids_TK) -> rows_PD`.

`expert_ids_TK` holds int32 logical ids, -1 where the pair belongs to another group. The result has one
unweighted row per non-negative id, in row-major (token, k) order, in the dtype of `x_TD`. T = 0 and P = 0 are legal.
"""


class DispatchHandle(Protocol):
    """What one `dispatch` left in flight; good for exactly one `combine` in the same generation."""

    @property
    def generation(self) -> int: ...


class Transport(Protocol):
    """The attention shard's end. Not thread-safe: one engine step at a time calls it."""

    @property
    def generation(self) -> int:
        """Generation of the placement this transport was connected under."""
        ...

    def dispatch(self, layer: int, x_TD: Tensor, expert_ids_TK: Tensor, weights_TK: Tensor) -> DispatchHandle:
        """Send each token to the groups that own its top-k experts; returns before they answer.

        Args:
            layer: model layer index (not the index among MoE layers).
            x_TD: activations, contiguous, bf16 or fp32; T = 0 is legal. Not written, free to reuse on return.
            expert_ids_TK: int32 logical ids, 0 <= id < num_routed_experts, distinct within a row.
            weights_TK: fp32 router weights, already renormalised and scaled.
        Raises:
            PeerLost: a group's connection is gone.
            StaleGeneration: a group is on another placement.
        """
        ...

    def combine(self, handle: DispatchHandle) -> Tensor:
        """Wait for the groups' rows and reduce them.

        Returns:
            y_TD in the dtype of the dispatched x: sum over k of weights[t, k] * expert_k(x[t]), in fp32, k ascending.
        Raises:
            PeerLost: a group died or did not answer within timeout_s; the handle is void.
            GroupFailed: a group answered with an error of its own.
        """
        ...

    def close(self) -> None:
        """Drop every connection; idempotent. Groups notice by end-of-file."""
        ...
