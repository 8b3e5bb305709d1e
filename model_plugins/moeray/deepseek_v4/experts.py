"""The routed experts of one group: only their bytes are read, and only their rows are computed.

Suffixes: T tokens, D hidden, I expert width, K experts per token, P (token, k) pairs, n rows of one expert.

Mathematics of one expert (DeepSeek-V4, `w1` gate, `w3` up, `w2` down, limit = swiglu_limit):

    gate = min(w1 x, limit)    up = clamp(w3 x, -limit, limit)    y = w2 (silu(gate) * up)

Rounding points: both matrix products give the activations' dtype; clamp, silu and the product between them are
fp32 and are rounded once, before w2. This is DeepSeek's own inference code; transformers' `DeepseekV4Experts`
rounds once more (silu and product in the activations' dtype) and agrees exactly in fp32. The router weight is
applied by the attention shard, after w2, as in transformers.

A row's bits depend only on the rows that the same call sends to the same expert: every expert has its own
64-byte aligned matrices and its own products of n rows, so that they are the same for every slicing of the
experts over groups (given the same number of threads).
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from time import perf_counter

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from moeray.deepseek_v4.checkpoint import Checkpoint
from moeray.deepseek_v4.errors import ExpertError
from moeray.deepseek_v4.names import PARTS
from moeray.deepseek_v4.tensor_reader import TensorReader, activation_dtype, read_matrix

Progress = Callable[[int, int], None]
"""`on_progress(bytes_read, bytes_total)`, after every expert."""


@dataclass(frozen=True, slots=True)
class ExpertWeights:
    """w13: [2 I, D] gate over up; w2: [D, I]."""

    w13: Tensor
    w2: Tensor


class RoutedExperts:
    """An `ExpertCompute` over a fixed set of experts; may be called from several threads at once."""

    def __init__(
        self,
        weights: Mapping[int, Mapping[int, ExpertWeights]],
        *,
        num_layers: int,
        num_experts: int,
        swiglu_limit: float,
    ) -> None:
        """Hold these matrices.

        Args:
            weights: layer -> logical expert -> its matrices.
            num_layers: rows of the load counters (model layers, not MoE layers).
        """
        self._weights = weights
        self._limit = swiglu_limit
        self._counts = RowCounts(num_layers, num_experts)
        self.bytes_read = 0
        self.load_seconds = 0.0

    @classmethod
    def load(
        cls,
        checkpoint: Checkpoint,
        experts_per_layer: Mapping[int, Sequence[int]],
        on_progress: Progress | None = None,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | None = None,
    ) -> RoutedExperts:
        """Read these experts' byte ranges and nothing else.

        Args:
            experts_per_layer: model layer -> logical experts to hold.
            dtype: of the matrices; None for the activations' (`shape.dtype`).
        Raises:
            CheckpointError: a file became unreadable or shorter since the checkpoint was opened.
            KeyError: a layer or expert that the checkpoint does not have.
        """
        shape, started = checkpoint.shape, perf_counter()
        names = [
            name for layer, experts in experts_per_layer.items() for name in checkpoint.expert_names(layer, experts)
        ]
        total = checkpoint.bytes_of(names)
        weights: dict[int, dict[int, ExpertWeights]] = {}
        wanted = dtype or activation_dtype(checkpoint)
        with TensorReader() as reader:
            for layer, experts in experts_per_layer.items():
                for expert in experts:
                    loaded = _read_expert(reader, checkpoint, layer, expert, wanted)
                    weights.setdefault(layer, {})[expert] = ExpertWeights(
                        loaded.w13.to(device=device), loaded.w2.to(device=device)
                    )
                    if on_progress is not None:
                        on_progress(reader.bytes_read, total)
            experts_ = cls(
                weights, num_layers=shape.num_layers, num_experts=shape.num_experts, swiglu_limit=shape.swiglu_limit
            )
            experts_.bytes_read = reader.bytes_read
        experts_.load_seconds = perf_counter() - started
        return experts_

    @property
    def held(self) -> dict[int, tuple[int, ...]]:
        """Model layer -> logical experts held, ascending."""
        return {layer: tuple(sorted(experts)) for layer, experts in self._weights.items()}

    @property
    def kernel(self) -> str:
        """What computes the products."""
        return "torch"

    @property
    def weight_bytes(self) -> int:
        """Memory of the matrices."""
        return sum(each.w13.nbytes + each.w2.nbytes for layer in self._weights.values() for each in layer.values())

    def tokens(self) -> NDArray[np.int64]:
        """[num_layers, num_experts] rows computed since the start (a copy)."""
        return self._counts.rows()

    def __call__(self, layer: int, x_TD: Tensor, expert_ids_TK: Tensor) -> Tensor:
        """See `moeray.transport.interface.ExpertCompute`.

        Raises:
            ExpertError: an expert that is not held, a wrong shape or dtype, or a non-finite row.
        """
        top_k = expert_ids_TK.shape[1]
        flat = expert_ids_TK.cpu().numpy().ravel()
        pairs = np.flatnonzero(flat >= 0)
        experts = flat[pairs]
        order = np.argsort(experts, kind="stable")
        sorted_experts = experts[order]
        starts = np.flatnonzero(np.diff(sorted_experts, prepend=-1))
        active = sorted_experts[starts]
        token_of_pair = torch.from_numpy(pairs[order] // top_k).to(x_TD.device)
        row_of_pair = torch.from_numpy(order).to(x_TD.device)
        rows_PD = x_TD.new_empty((len(pairs), x_TD.shape[1]))
        bounds = [*starts.tolist(), len(pairs)]
        for expert, begin, end in zip(active.tolist(), bounds, bounds[1:], strict=False):
            x_nD = x_TD.index_select(0, token_of_pair[begin:end])
            rows_PD.index_copy_(0, row_of_pair[begin:end], self._expert(layer, expert, x_nD))
        require_finite(layer, x_TD, rows_PD, experts)
        self._counts.add(layer, experts)
        return rows_PD

    def pre_activations(self, layer: int, expert: int, x_nD: Tensor) -> Tensor:
        """[n, 2 I] gate beside up, before the clamp.

        Raises:
            ExpertError: the expert is not held, or the activations are not of its shape and dtype.
        """
        w13 = self._held(layer, expert).w13
        if x_nD.dtype != w13.dtype or x_nD.shape[1] != w13.shape[1]:
            raise ExpertError(
                f"activations are {x_nD.dtype} x {x_nD.shape[1]}, the experts {w13.dtype} x {w13.shape[1]}"
            )
        return functional.linear(x_nD, w13)

    def _held(self, layer: int, expert: int) -> ExpertWeights:
        weights = self._weights.get(layer, {}).get(expert)
        if weights is None:
            raise ExpertError(f"expert {expert} of layer {layer} is not held here")
        return weights

    def _expert(self, layer: int, expert: int, x_nD: Tensor) -> Tensor:
        gate_nI, up_nI = self.pre_activations(layer, expert, x_nD).float().chunk(2, dim=1)
        gate_nI.clamp_(max=self._limit)
        up_nI.clamp_(-self._limit, self._limit)
        return functional.linear(functional.silu(gate_nI).mul_(up_nI).to(x_nD.dtype), self._held(layer, expert).w2)


class RowCounts:
    """Rows computed per layer and expert; thread-safe."""

    def __init__(self, num_layers: int, num_experts: int) -> None:
        self._rows_LE = np.zeros((num_layers, num_experts), dtype=np.int64)
        self._lock = threading.Lock()

    def add(self, layer: int, experts_P: NDArray[np.int32]) -> None:
        """Count one call: the expert of every row it computed."""
        rows_E = np.bincount(experts_P, minlength=self._rows_LE.shape[1])
        with self._lock:
            self._rows_LE[layer] += rows_E

    def rows(self) -> NDArray[np.int64]:
        """[num_layers, num_experts] (a copy)."""
        with self._lock:
            return self._rows_LE.copy()


def require_finite(layer: int, x_TD: Tensor, rows_PD: Tensor, experts_P: NDArray[np.int32]) -> None:
    """Raises ExpertError if rows hold NaN or Inf: it names the experts, or the shard if that sent such activations."""
    # One sum is the cheap sieve: it is finite unless a row is not (or the sum itself overflows fp32).
    if rows_PD.sum(dtype=torch.float32).isfinite().item():
        return
    bad_P = (~rows_PD.isfinite().all(dim=1)).cpu().numpy()
    if bad_P.any() and not x_TD.isfinite().all():
        raise ExpertError(f"layer {layer}: the shard sent activations that hold NaN or Inf")
    if bad_P.any():
        raise ExpertError(f"layer {layer}: experts {sorted(set(experts_P[bad_P].tolist()))} gave NaN or Inf")


def _read_expert(
    reader: TensorReader, checkpoint: Checkpoint, layer: int, expert: int, dtype: torch.dtype
) -> ExpertWeights:
    w1, w2, w3 = (checkpoint.expert_matrix(layer, expert, part) for part in PARTS)
    if all(matrix.scale is None for matrix in (w1, w2, w3)) and w1.weight.dtype == w3.weight.dtype:
        w13, w2_ = reader.read([w1.weight, w3.weight]), reader.read([w2.weight])
        return ExpertWeights(w13.to(dtype=dtype), w2_.to(dtype=dtype))
    gate, down, up = (read_matrix(reader, matrix, dtype) for matrix in (w1, w2, w3))
    return ExpertWeights(torch.cat((gate, up)), down)
