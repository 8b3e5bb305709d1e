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

from collections.abc import Callable, Iterator, Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from moeray.deepseek_v4.checkpoint import Checkpoint
from moeray.deepseek_v4.errors import ExpertError
from moeray.deepseek_v4.expert_formula import ExpertWeights, pre_activations
from moeray.deepseek_v4.expert_store import ExpertsPerLayer, ExpertStore, PlainExperts, not_finite
from moeray.deepseek_v4.heap import give_back
from moeray.deepseek_v4.names import PARTS
from moeray.deepseek_v4.row_counts import RowCounts
from moeray.deepseek_v4.tensor_reader import TensorReader, activation_dtype, read_matrix

Progress = Callable[[int, int], None]
"""`on_progress(bytes_read, bytes_total)` of one `hold`, after every expert. What it raises ends that `hold`."""


class HeldExperts:
    """An `ExpertCompute` over the experts of a store; may be called from several threads at once."""

    def __init__(self, store: ExpertStore, *, num_layers: int, num_experts: int) -> None:
        """Compute what the store holds, now and later.

        Args:
            num_layers: rows of the load counters (model layers, not MoE layers).
        """
        self._store = store
        self._counts = RowCounts(num_layers, num_experts)

    @property
    def held(self) -> dict[int, tuple[int, ...]]:
        """Model layer -> logical experts held, ascending; without layers that hold none."""
        return self._store.held

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

    def scrub(self) -> Iterator[int]:
        """See `ExpertStore.scrub`."""
        return self._store.scrub()

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


class RoutedExperts(HeldExperts):
    """Experts of a checkpoint that come and go while others are computed.

    One thread at a time may call `hold` and `release`. Calls never wait for it (but they share the cores with it), and
    a row's bits do not depend on what else is held.

    Attributes:
        bytes_read: taken from weight files so far.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | None = None,
        compiled: bool = True,
        num_threads: int | None = None,
    ) -> None:
        """Hold nothing yet.

        Args:
            dtype: of the matrices; None for the activations' (`shape.dtype`).
            compiled: the kernel where there is one; False for the formula, its oracle.
            num_threads: of one call of the kernel; None for as many as torch's products use in this thread. Bits
                are the same for every number.
        Raises:
            CheckpointError: config.json's dtype is not one of torch's.
        """
        shape = checkpoint.shape
        self._checkpoint, self._device = checkpoint, device
        self._dtype = dtype or activation_dtype(checkpoint)
        on_cpu = device is None or device.type == "cpu"
        store = new_store(
            shape.hidden_size, shape.intermediate_size, self._dtype, num_experts=shape.num_experts,
            limit=shape.swiglu_limit, compiled=compiled and on_cpu, num_threads=num_threads,
        )  # fmt: skip
        super().__init__(store, num_layers=shape.num_layers, num_experts=shape.num_experts)
        self.bytes_read = 0

    @classmethod
    def load(
        cls,
        checkpoint: Checkpoint,
        experts_per_layer: ExpertsPerLayer,
        on_progress: Progress | None = None,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | None = None,
        compiled: bool = True,
        num_threads: int | None = None,
    ) -> RoutedExperts:
        """The constructor and one `hold`."""
        experts = cls(checkpoint, dtype=dtype, device=device, compiled=compiled, num_threads=num_threads)
        experts.hold(experts_per_layer, on_progress)
        return experts

    def hold(self, experts_per_layer: ExpertsPerLayer, on_progress: Progress | None = None) -> None:
        """Read the byte ranges of those that are not held, and nothing else; each can be called once it is there.

        Beside what is held there is one expert in memory at a time. After an error everything that was held, and what
        had been read until then, is still held.

        Args:
            experts_per_layer: to be held beside those that are.
        Raises:
            CheckpointError: the checkpoint has no such expert; or a file became unreadable, or changed, since it was
                opened: its identity was told then, and another one's experts must not come beside it.
        """
        missing, is_first = missing_from(self.held, experts_per_layer), not self.held
        total = bytes_of(self._checkpoint, missing)
        with TensorReader(self._checkpoint) as reader:
            for layer, experts in missing.items():
                for expert in experts:
                    before = reader.bytes_read
                    weights = _read_expert(reader, self._checkpoint, layer, expert, self._dtype, self._device)
                    self._store.put(layer, expert, weights)
                    self.bytes_read += reader.bytes_read - before
                    if on_progress is not None:
                        on_progress(reader.bytes_read, total)
        if is_first:
            give_back()

    def release(self, experts_per_layer: ExpertsPerLayer) -> None:
        """Hold only these of what is held. Calls that run keep the matrices that they began with."""
        self._store.keep(experts_per_layer)


def given_experts(
    weights: Mapping[int, Mapping[int, ExpertWeights]],
    *,
    num_layers: int,
    num_experts: int,
    swiglu_limit: float,
    compiled: bool = True,
    num_threads: int | None = None,
) -> HeldExperts:
    """Experts of these matrices, all of one shape and dtype.

    Args:
        weights: layer -> logical expert -> its matrices.
        num_layers, num_experts: as in `HeldExperts`.
        compiled, num_threads: as in `RoutedExperts`.
    """
    first = next(expert for layer in weights.values() for expert in layer.values())
    hidden_size, width = first.w2.shape
    on_cpu = first.w13.device.type == "cpu"
    store = new_store(
        hidden_size, width, first.w13.dtype, num_experts=num_experts, limit=swiglu_limit, compiled=compiled and on_cpu,
        num_threads=num_threads,
    )  # fmt: skip
    for layer, experts in weights.items():
        for expert, matrices in experts.items():
            store.put(layer, expert, matrices)
    return HeldExperts(store, num_layers=num_layers, num_experts=num_experts)


def missing_from(held: ExpertsPerLayer, wanted: ExpertsPerLayer) -> dict[int, list[int]]:
    """Model layer -> experts that are wanted and not held, ascending; without layers of which nothing is missing."""
    missing = {layer: sorted(set(experts).difference(held.get(layer, ()))) for layer, experts in wanted.items()}
    return {layer: experts for layer, experts in missing.items() if experts}


def bytes_of(checkpoint: Checkpoint, experts_per_layer: ExpertsPerLayer) -> int:
    """Stored bytes of these experts.

    Raises:
        CheckpointError: it has no such expert.
    """
    names = (
        name for layer, experts in experts_per_layer.items() for name in checkpoint.expert_names(layer, list(experts))
    )
    return checkpoint.bytes_of(names)


def new_store(
    hidden_size: int, width: int, dtype: torch.dtype, *, num_experts: int, limit: float, compiled: bool,
    num_threads: int | None,
) -> ExpertStore:  # fmt: skip
    """An empty store for experts of this shape: the CPU kernel's, unless it is not wanted or not for this dtype."""
    if not compiled:
        return PlainExperts(limit)
    from moeray.deepseek_v4.packed_experts import DTYPES, PackedExperts  # brings numba, and compiles

    if dtype not in DTYPES:
        return PlainExperts(limit)
    return PackedExperts(
        hidden_size=hidden_size, width=width, dtype=dtype, num_experts=num_experts, limit=limit,
        num_threads=num_threads or torch.get_num_threads(),
    )  # fmt: skip


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
