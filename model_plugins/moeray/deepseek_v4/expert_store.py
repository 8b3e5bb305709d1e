"""What holds experts' matrices and computes their rows; here the plain one, `packed_experts` has the CPU kernel's.

Suffixes: T tokens, D hidden, K experts per token, P (token, k) pairs.
"""

from __future__ import annotations

import threading
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from moeray.deepseek_v4.errors import ExpertError
from moeray.deepseek_v4.expert_formula import ExpertWeights, expert_rows

ExpertsPerLayer = Mapping[int, Collection[int]]
"""Model layer -> logical experts."""
Held = TypeVar("Held")


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
    """Matrices of some experts of some layers.

    `rows` may be called from several threads at once, also while another thread puts and keeps: a call computes with
    what was held when it began, and what is dropped meanwhile lives until that call has ended.
    """

    batch_invariant: bool
    """A row's bits depend on its own token and expert alone."""
    kernel: str
    """What computes the products."""

    @property
    def held(self) -> dict[int, tuple[int, ...]]:
        """Layer -> experts held, ascending; without layers that hold none."""
        ...

    def put(self, layer: int, expert: int, weights: ExpertWeights) -> None:
        """Hold one more, from the next call on."""
        ...

    def keep(self, experts_per_layer: ExpertsPerLayer) -> None:
        """Drop all others, from the next call on."""
        ...

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

    def scrub(self) -> Iterator[int]:
        """Compare what is held with what was put, once, piece by piece; in any thread, beside calls.

        Yields:
            bytes compared, after each piece.
        Raises:
            ExpertError: an expert's matrices are not those that were put.
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
        self._lock = threading.Lock()
        self._layers: Mapping[int, Mapping[int, ExpertWeights]] = {}  # none of them is ever changed

    @property
    def held(self) -> dict[int, tuple[int, ...]]:
        return {layer: tuple(sorted(experts)) for layer, experts in self._layers.items()}

    def put(self, layer: int, expert: int, weights: ExpertWeights) -> None:
        with self._lock:
            self._layers = {**self._layers, layer: {**self._layers.get(layer, {}), expert: weights}}

    def keep(self, experts_per_layer: ExpertsPerLayer) -> None:
        with self._lock:
            self._layers = kept(self._layers, experts_per_layer)

    def scrub(self) -> Iterator[int]:
        """Nothing is compared: the matrices are the caller's own tensors."""
        return iter(())

    def get(self, layer: int, expert: int) -> ExpertWeights:
        return _of(self._layers.get(layer, {}), layer, expert)

    @property
    def weight_bytes(self) -> int:
        return sum(each.w13.nbytes + each.w2.nbytes for layer in self._layers.values() for each in layer.values())

    def rows(self, layer: int, x_TD: Tensor, ids_TK: Tensor, out_PD: Tensor | None = None) -> Rows:
        flat, held = ids_TK.cpu().numpy().ravel(), self._layers.get(layer, {})
        pairs = np.flatnonzero(flat >= 0)
        experts_P = flat[pairs]
        if out_PD is None:
            out_PD = x_TD.new_empty((len(pairs), x_TD.shape[1]))
        require_room(out_PD, len(pairs), x_TD.dtype, x_TD.shape[1])
        rows_PD = out_PD[: len(pairs)]
        for expert in np.unique(experts_P).tolist():
            rows = np.flatnonzero(experts_P == expert)
            x_nD = x_TD.index_select(0, torch.from_numpy(pairs[rows] // ids_TK.shape[1]).to(x_TD.device))
            y_nD = expert_rows(_of(held, layer, expert), self._limit, x_nD)
            rows_PD.index_copy_(0, torch.from_numpy(rows).to(x_TD.device), y_nD)
        return Rows(rows_PD, experts_P, not_finite(rows_PD))


def kept(layers: Mapping[int, Mapping[int, Held]], experts_per_layer: ExpertsPerLayer) -> dict[int, Mapping[int, Held]]:
    """What of these is kept; a layer of which nothing is missing is the same object."""
    result: dict[int, Mapping[int, Held]] = {}
    for layer, experts in layers.items():
        wanted = set(experts_per_layer.get(layer, ()))
        rest = experts if wanted.issuperset(experts) else {key: experts[key] for key in experts if key in wanted}
        if rest:
            result[layer] = rest
    return result


def _of(held: Mapping[int, ExpertWeights], layer: int, expert: int) -> ExpertWeights:
    try:
        return held[expert]
    except KeyError:
        raise not_held(layer, expert) from None


def not_held(layer: int, expert: int) -> ExpertError:
    return ExpertError(f"expert {expert} of layer {layer} is not held here")


def damaged(layer: int, expert: int) -> ExpertError:
    return ExpertError(f"expert {expert} of layer {layer} has changed in memory since it was loaded")


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
