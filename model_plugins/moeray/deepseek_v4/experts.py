"""The routed experts of one group: only their bytes are read, and only their rows are computed.

Suffixes: T tokens, D hidden, I expert width, K experts per token, P (token, k) pairs, n rows of one expert.

Mathematics of one expert (DeepSeek-V4, `w1` gate, `w3` up, `w2` down, limit = swiglu_limit):

    gate = min(w1 x, limit)    up = clamp(w3 x, -limit, limit)    y = w2 (silu(gate) * up)

Rounding points: both matrix products give the activations' dtype; clamp, silu and the product between them are
fp32 and are rounded once, before w2. This is DeepSeek's own inference code; transformers' `DeepseekV4Experts`
rounds once more (silu and product in the activations' dtype) and agrees exactly in fp32. The router weight is
applied by the attention shard, after w2, as in transformers.

On a CPU a compiled kernel computes bf16 and fp32 rows (`expert_kernel`); a row's bits then depend on nothing but its
own token and expert. On other devices, and for other dtypes, torch's products do, expert after expert
(`expert_formula`).
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from time import perf_counter

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from moeray.deepseek_v4.checkpoint import Checkpoint
from moeray.deepseek_v4.errors import ExpertError
from moeray.deepseek_v4.expert_formula import ExpertWeights, pre_activations
from moeray.deepseek_v4.expert_store import ExpertStore, PlainExperts, not_finite
from moeray.deepseek_v4.names import PARTS
from moeray.deepseek_v4.tensor_reader import TensorReader, activation_dtype, read_matrix

Progress = Callable[[int, int], None]
"""`on_progress(bytes_read, bytes_total)`, after every expert."""


class RoutedExperts:
    """An `ExpertCompute` over a fixed set of experts; may be called from several threads at once."""

    def __init__(
        self,
        weights: Mapping[int, Mapping[int, ExpertWeights]],
        *,
        num_layers: int,
        num_experts: int,
        swiglu_limit: float,
        compiled: bool = True,
        num_threads: int | None = None,
    ) -> None:
        """Hold these matrices.

        Args:
            weights: layer -> logical expert -> its matrices.
            num_layers: rows of the load counters (model layers, not MoE layers).
            compiled: the kernel where there is one; False for the formula, its oracle.
            num_threads: of one call of the kernel; None for as many as torch's products use in this thread. Bits
                are the same for every number.
        """
        first = next((expert for layer in weights.values() for expert in layer.values()), None)
        held = {layer: tuple(experts) for layer, experts in weights.items()}
        self._store = _store_for(first, held, num_experts, swiglu_limit, compiled, num_threads)
        for layer, experts in weights.items():
            for expert, matrices in experts.items():
                self._store.put(layer, expert, matrices)
        self._held = held
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
        compiled: bool = True,
        num_threads: int | None = None,
    ) -> RoutedExperts:
        """Read these experts' byte ranges and nothing else.

        Args:
            experts_per_layer: model layer -> logical experts to hold.
            dtype: of the matrices; None for the activations' (`shape.dtype`).
            compiled, num_threads: as in the constructor.
        Raises:
            CheckpointError: a file became unreadable or shorter since the checkpoint was opened.
            KeyError: a layer or expert that the checkpoint does not have.
        """
        shape, started = checkpoint.shape, perf_counter()
        names = [
            name for layer, experts in experts_per_layer.items() for name in checkpoint.expert_names(layer, experts)
        ]
        total = checkpoint.bytes_of(names)
        wanted = dtype or activation_dtype(checkpoint)
        store: ExpertStore | None = None
        with TensorReader() as reader:
            for layer, experts in experts_per_layer.items():
                for expert in experts:
                    weights = _read_expert(reader, checkpoint, layer, expert, wanted, device)
                    if store is None:
                        store = _store_for(
                            weights, experts_per_layer, shape.num_experts, shape.swiglu_limit, compiled, num_threads
                        )
                    store.put(layer, expert, weights)
                    if on_progress is not None:
                        on_progress(reader.bytes_read, total)
            loaded = cls(
                {}, num_layers=shape.num_layers, num_experts=shape.num_experts, swiglu_limit=shape.swiglu_limit
            )
            loaded._store = store or loaded._store
            loaded._held = {layer: tuple(experts) for layer, experts in experts_per_layer.items()}
            loaded.bytes_read = reader.bytes_read
        loaded.load_seconds = perf_counter() - started
        return loaded

    @property
    def held(self) -> dict[int, tuple[int, ...]]:
        """Model layer -> logical experts held, ascending."""
        return {layer: tuple(sorted(experts)) for layer, experts in self._held.items()}

    @property
    def kernel(self) -> str:
        """What computes the products."""
        return self._store.kernel

    @property
    def batch_invariant(self) -> bool:
        """A row's bits depend on its own token and expert alone, so that calls may be merged or split."""
        return self._store.batch_invariant

    @property
    def weight_bytes(self) -> int:
        """Memory of the matrices."""
        return self._store.weight_bytes

    def weights(self, layer: int, expert: int) -> ExpertWeights:
        """One expert's matrices as they were given (a copy where the kernel keeps them in its own order).

        Raises:
            ExpertError: the expert is not held.
        """
        return self._store.get(layer, expert)

    def tokens(self) -> NDArray[np.int64]:
        """[num_layers, num_experts] rows computed since the start (a copy)."""
        return self._counts.rows()

    def __call__(self, layer: int, x_TD: Tensor, expert_ids_TK: Tensor, out_PD: Tensor | None = None) -> Tensor:
        """See `moeray.transport.interface.ExpertCompute`.

        Args:
            out_PD: where the rows are to lie, contiguous, with room for them; None for new memory.
        Raises:
            ExpertError: an expert that is not held, a wrong shape or dtype, or a non-finite row.
        """
        result = self._store.rows(layer, x_TD, expert_ids_TK, out_PD)
        if result.bad_P is not None:
            raise blame(layer, x_TD, result.bad_P, result.experts_P)
        self._counts.add(layer, result.experts_P)
        return result.rows_PD

    def pre_activations(self, layer: int, expert: int, x_nD: Tensor) -> Tensor:
        """[n, 2 I] gate beside up, before the clamp.

        Raises:
            ExpertError: the expert is not held, or the activations are not of its shape and dtype.
        """
        return pre_activations(self.weights(layer, expert), x_nD)


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
    """Raises ExpertError as `blame` has it if rows hold NaN or Inf."""
    bad_P = not_finite(rows_PD)
    if bad_P is not None:
        raise blame(layer, x_TD, bad_P, experts_P)


def blame(layer: int, x_TD: Tensor, bad_P: NDArray[np.uint8], experts_P: NDArray[np.int32]) -> ExpertError:
    """The error for these bad rows: it names the experts, or the shard if that sent such activations."""
    if not x_TD.isfinite().all():
        return ExpertError(f"layer {layer}: the shard sent activations that hold NaN or Inf")
    return ExpertError(f"layer {layer}: experts {sorted(set(experts_P[bad_P > 0].tolist()))} gave NaN or Inf")


def _store_for(
    first: ExpertWeights | None,
    held: Mapping[int, Sequence[int]],
    num_experts: int,
    limit: float,
    compiled: bool,
    num_threads: int | None,
) -> ExpertStore:
    """A store for experts like the first one."""
    if not compiled or first is None or first.w13.device.type != "cpu":
        return PlainExperts(limit)
    from moeray.deepseek_v4.packed_experts import DTYPES, PackedExperts  # brings numba, and compiles

    if first.w13.dtype not in DTYPES:
        return PlainExperts(limit)
    threads = num_threads or torch.get_num_threads()
    return PackedExperts(held, first, num_experts=num_experts, limit=limit, num_threads=threads)


def _read_expert(
    reader: TensorReader,
    checkpoint: Checkpoint,
    layer: int,
    expert: int,
    dtype: torch.dtype,
    device: torch.device | None,
) -> ExpertWeights:
    w1, w2, w3 = (checkpoint.expert_matrix(layer, expert, part) for part in PARTS)
    if all(matrix.scale is None for matrix in (w1, w2, w3)) and w1.weight.dtype == w3.weight.dtype:
        w13, w2_ = reader.read([w1.weight, w3.weight]), reader.read([w2.weight])
        return ExpertWeights(w13.to(device, dtype), w2_.to(device, dtype))
    gate, down, up = (read_matrix(reader, matrix, dtype) for matrix in (w1, w2, w3))
    return ExpertWeights(torch.cat((gate, up)).to(device), down.to(device))
