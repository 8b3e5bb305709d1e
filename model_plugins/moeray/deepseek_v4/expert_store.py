"""What holds experts' matrices and computes their rows; here the plain one, `packed_experts` has the CPU kernel's.

Suffixes: T tokens, D hidden, K experts per token, P (token, k) pairs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from moeray.deepseek_v4.errors import ExpertError
from moeray.deepseek_v4.expert_formula import ExpertWeights, expert_rows


@dataclass(frozen=True, slots=True)
class Rows:
    """What one call computed.

    Attributes:
        rows_PD: one row per non-negative id, in row-major (token, k) order.
        experts_P: the expert of each row.
        bad_P: 1 where a row holds NaN or Inf; None if every row is finite.
    """

    rows_PD: Tensor
    experts_P: NDArray[np.int32]
    bad_P: NDArray[np.uint8] | None


class ExpertStore(Protocol):
    """Matrices of some experts of some layers; `rows` may be called from several threads at once."""

    batch_invariant: bool
    """A row's bits depend on its own token and expert alone."""
    kernel: str
    """What computes the products."""

    def put(self, layer: int, expert: int, weights: ExpertWeights) -> None: ...

    def get(self, layer: int, expert: int) -> ExpertWeights:
        """Raises ExpertError if it is not held."""
        ...

    def rows(self, layer: int, x_TD: Tensor, ids_TK: Tensor, out_PD: Tensor | None = None) -> Rows:
        """Compute one call.

        Args:
            out_PD: where the rows are to lie, contiguous, with room for them; None for new memory.
        Raises:
            ExpertError: an expert that is not held, or activations (or `out_PD`) of another shape or dtype.
        """
        ...

    @property
    def weight_bytes(self) -> int: ...


class PlainExperts:
    """The formula in torch's own products, one expert after the other, on any device.

    A row's bits depend on the rows that the same call sends to the same expert, because torch's products do.
    """

    batch_invariant = False
    kernel = "torch"

    def __init__(self, limit: float) -> None:
        self._limit = limit
        self._weights: dict[tuple[int, int], ExpertWeights] = {}

    def put(self, layer: int, expert: int, weights: ExpertWeights) -> None:
        self._weights[layer, expert] = weights

    def get(self, layer: int, expert: int) -> ExpertWeights:
        weights = self._weights.get((layer, expert))
        if weights is None:
            raise not_held(layer, expert)
        return weights

    @property
    def weight_bytes(self) -> int:
        return sum(each.w13.nbytes + each.w2.nbytes for each in self._weights.values())

    def rows(self, layer: int, x_TD: Tensor, ids_TK: Tensor, out_PD: Tensor | None = None) -> Rows:
        flat = ids_TK.cpu().numpy().ravel()
        pairs = np.flatnonzero(flat >= 0)
        experts_P = flat[pairs]
        if out_PD is None:
            out_PD = x_TD.new_empty((len(pairs), x_TD.shape[1]))
        require_room(out_PD, len(pairs), x_TD.dtype, x_TD.shape[1])
        rows_PD = out_PD[: len(pairs)]
        for expert in np.unique(experts_P).tolist():
            rows = np.flatnonzero(experts_P == expert)
            x_nD = x_TD.index_select(0, torch.from_numpy(pairs[rows] // ids_TK.shape[1]).to(x_TD.device))
            y_nD = expert_rows(self.get(layer, expert), self._limit, x_nD)
            rows_PD.index_copy_(0, torch.from_numpy(rows).to(x_TD.device), y_nD)
        return Rows(rows_PD, experts_P, not_finite(rows_PD))


def not_held(layer: int, expert: int) -> ExpertError:
    return ExpertError(f"expert {expert} of layer {layer} is not held here")


def require_room(out_PD: Tensor, num_rows: int, dtype: torch.dtype, hidden_size: int) -> None:
    """Raises ExpertError if these rows do not fit there."""
    fits = len(out_PD) >= num_rows and out_PD.shape[1:] == (hidden_size,)
    if not fits or out_PD.dtype != dtype or not out_PD.is_contiguous():
        raise ExpertError(
            f"no room for {num_rows} rows of {dtype} x {hidden_size} in {out_PD.dtype} {list(out_PD.shape)}"
            f"{'' if out_PD.is_contiguous() else ', not contiguous'}"
        )


def not_finite(rows_PD: Tensor) -> NDArray[np.uint8] | None:
    """[P] 1 for each row that holds NaN or Inf; None if there is none."""
    # One sum is the cheap sieve: it is finite unless a row is not (or the sum itself overflows fp32).
    if rows_PD.sum(dtype=torch.float32).isfinite().item():
        return None
    bad_P: NDArray[np.uint8] = (~rows_PD.isfinite().all(dim=1)).to(torch.uint8).cpu().numpy()
    return bad_P if bad_P.any() else None
