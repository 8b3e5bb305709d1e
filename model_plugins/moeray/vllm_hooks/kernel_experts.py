"""The routed experts of one group on vLLM's fused MoE kernels: bf16, FP8 and FP4 weights as they are stored.

An `ExpertCompute` like `moeray.deepseek_v4.RoutedExperts`, where vLLM has kernels for the format. vLLM's own
oracle chooses the kernel by the device's capability; where it has none for the format, loading fails and names both.
Whatever kernel was chosen must first give the rows that the formula gives (`_check_kernel`): vLLM 0.32 has kernels that
leave the swiglu clamp out without a word.

A call computes single (token, expert) pairs: each is handed to the kernel as a token of its own with top-1 routing and
weight 1, because the attention shard reduces the rows itself, in fixed order.

The wiring below (layer, loading, call) is run on CPU by the tests, with vLLM's unquantised kernel; the FP8 and FP4
kernels need a GPU (or AMX) and have not been run yet.

Suffixes: T tokens, D hidden, K experts per token, P pairs.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.v1.worker.workspace import init_workspace_manager, is_workspace_manager_initialized

from moeray.deepseek_v4.checkpoint import Checkpoint
from moeray.deepseek_v4.errors import ExpertError
from moeray.deepseek_v4.expert_store import ExpertsPerLayer
from moeray.deepseek_v4.experts import Progress, RoutedExperts, bytes_of, missing_from, require_finite
from moeray.deepseek_v4.row_counts import RowCounts
from moeray.deepseek_v4.tensor_reader import TensorReader, activation_dtype
from moeray.vllm_hooks.kernel_layer import fill, format_of, new_container

# A kernel may quantise the activations (FP8: 2^-4 per element); a missing clamp is wrong by the size of the rows.
CHECK_ROWS, CHECK_TOLERANCE = 4, 0.1


@dataclass(frozen=True, slots=True)
class _Layer:
    """What is held of one layer. Never changed: a call goes on with the one that it began with.

    Attributes:
        experts: the container's, in its order.
        slot_E: where each expert lies, -1 where it is not held.
        container: vLLM's, with weights as its kernel reads them.
    """

    experts: tuple[int, ...]
    slot_E: NDArray[np.int32]
    container: Any

    @property
    def parameters(self) -> dict[str, Tensor]:
        return dict(self.container.named_parameters())


class KernelExperts:
    """See module docstring. Calls from several threads are serialised: the kernels share vLLM's workspace.

    One thread at a time may call `hold` and `release`; calls do not wait for it.

    Attributes:
        bytes_read: taken from weight files so far.
    """

    def __init__(self, checkpoint: Checkpoint, *, device: torch.device) -> None:
        """Hold nothing yet."""
        shape = checkpoint.shape
        self._checkpoint, self._device = checkpoint, device
        self._layers: Mapping[int, _Layer] = {}  # replaced as a whole
        self._counts = RowCounts(shape.num_layers, shape.num_experts)
        self._lock = threading.Lock()
        self.bytes_read = 0
        if device.type != "cpu" and not is_workspace_manager_initialized():
            init_workspace_manager(device)

    @classmethod
    def load(
        cls,
        checkpoint: Checkpoint,
        experts_per_layer: ExpertsPerLayer,
        on_progress: Progress | None = None,
        *,
        device: torch.device,
    ) -> KernelExperts:
        """The constructor and one `hold`."""
        experts = cls(checkpoint, device=device)
        experts.hold(experts_per_layer, on_progress)
        return experts

    def hold(self, experts_per_layer: ExpertsPerLayer, on_progress: Progress | None = None) -> None:
        """Read the byte ranges of those that are not held, in their stored format; a layer's can be called at once.

        A kernel's weights lie in one piece: while a layer grows, its old piece is there beside the new one. After an
        error what was held, and the layers that were done, are still held.

        Args:
            experts_per_layer: to be held beside those that are.
        Raises:
            CheckpointError: as `RoutedExperts.hold`, or vLLM has no kernel for the format on this device.
            ExpertError: the kernel vLLM chose does not compute what the formula says.
        """
        missing = missing_from(self.held, experts_per_layer)
        total, before = bytes_of(self._checkpoint, missing), self.bytes_read

        def count(num_bytes: int) -> None:
            self.bytes_read += num_bytes
            if on_progress is not None:
                on_progress(self.bytes_read - before, total)

        with TensorReader(self._checkpoint) as reader:
            for layer, experts in missing.items():
                with _building():
                    self._put(layer, self._grown(layer, experts, reader, count))

    def release(self, experts_per_layer: ExpertsPerLayer) -> None:
        """Hold only these of what is held. Calls that run keep the weights that they began with."""
        for layer, held in self._layers.items():
            wanted = set(experts_per_layer.get(layer, ()))
            rest = tuple(expert for expert in held.experts if expert in wanted)
            if not rest:
                self._layers = {key: value for key, value in self._layers.items() if key != layer}
            elif rest != held.experts:
                with _building():
                    self._put(layer, self._copied(layer, rest, held))

    def _grown(self, layer: int, added: Sequence[int], reader: TensorReader, count: Callable[[int], None]) -> _Layer:
        """One layer's old experts and these, read and checked."""
        old = self._layers.get(layer)
        new = self._new(layer, added)
        for slot, expert in enumerate(added):
            before = reader.bytes_read
            fill(new.container, reader, self._checkpoint, layer, expert, slot)
            count(reader.bytes_read - before)
        new.container.quant_method.process_weights_after_loading(new.container)
        if old is not None:
            new = self._copied(layer, sorted({*old.experts, *added}), old, new)
        self._check_kernel(layer, new, added[0])
        if old is not None:
            self._check_kernel(layer, new, old.experts[0])
        return new

    def _new(self, layer: int, experts: Sequence[int]) -> _Layer:
        slot_E = np.full(self._checkpoint.shape.num_experts, -1, dtype=np.int32)
        slot_E[list(experts)] = np.arange(len(experts))
        with torch.device(self._device):
            return _Layer(tuple(experts), slot_E, new_container(self._checkpoint, layer, experts))

    def _copied(self, layer: int, experts: Sequence[int], *sources: _Layer) -> _Layer:
        """A piece with these experts, whose weights are in one of the sources as the kernel reads them.

        Raises:
            ExpertError: this kernel keeps weights that are not expert after expert.
        """
        new = self._new(layer, experts)
        new.container.quant_method.process_weights_after_loading(new.container)
        parameters = new.parameters
        for source in sources:
            shared = [expert for expert in experts if source.slot_E[expert] >= 0]
            to, origin = (torch.from_numpy(each.slot_E[shared]).to(self._device) for each in (new, source))
            for name, old in source.parameters.items():
                target = parameters[name]
                if len(old) != len(source.experts) or target.shape[1:] != old.shape[1:] or target.dtype != old.dtype:
                    raise ExpertError(f"vLLM's kernel keeps {name} as {list(old.shape)}: its experts cannot be changed")
                raw = torch.uint8 if old.element_size() == 1 else old.dtype  # 8-bit floats cannot be indexed
                target.data.view(raw)[to.long()] = old.data.view(raw)[origin.long()]
        return new

    def _put(self, layer: int, new: _Layer) -> None:
        self._layers = {**self._layers, layer: new}

    @property
    def held(self) -> dict[int, tuple[int, ...]]:
        """Model layer -> logical experts held, ascending; without layers that hold none."""
        return {layer: tuple(sorted(held.experts)) for layer, held in self._layers.items()}

    @property
    def weight_bytes(self) -> int:
        """Device memory of the weights, as the kernels keep them."""
        return sum(each.nbytes for layer in self._layers.values() for each in layer.parameters.values())

    @property
    def kernel(self) -> str:
        """Name of vLLM's kernel class; empty before there is one."""
        for layer in self._layers.values():
            return _kernel_of(layer)
        return ""

    def scrub(self) -> Iterator[int]:
        """Nothing is compared: the memory of a data centre's GPU finds its own errors."""
        return iter(())

    def tokens(self) -> NDArray[np.int64]:
        """[num_layers, num_experts] rows computed since the start (a copy)."""
        return self._counts.rows()

    def __call__(self, layer: int, x_TD: Tensor, expert_ids_TK: Tensor) -> Tensor:
        """See `moeray.transport.interface.ExpertCompute`.

        Raises:
            ExpertError: an expert that is not held, or a non-finite row.
        """
        held = self._layers.get(layer)
        ids = expert_ids_TK.cpu().numpy()
        pairs = np.flatnonzero(ids.ravel() >= 0)
        experts = ids.ravel()[pairs]
        slots = np.full_like(experts, -1) if held is None else held.slot_E[experts]
        if (slots < 0).any():
            raise ExpertError(f"experts {sorted(set(experts[slots < 0].tolist()))} of layer {layer} are not held here")
        if held is None or not len(pairs):
            return x_TD.new_empty((0, x_TD.shape[1]))
        x_PD = x_TD.index_select(0, torch.from_numpy(pairs // ids.shape[1]).to(x_TD.device))
        rows_PD = self._rows(held, x_PD, torch.from_numpy(slots).to(x_TD.device))
        require_finite(layer, x_TD, rows_PD, experts)
        self._counts.add(layer, experts)
        return rows_PD

    def _rows(self, held: _Layer, x_PD: Tensor, slots_P: Tensor) -> Tensor:
        container = held.container
        weights_P1 = torch.ones((len(slots_P), 1), dtype=torch.float32, device=x_PD.device)
        with self._lock:
            rows_PD: Tensor = container.quant_method.apply(
                container, x_PD, weights_P1, slots_P.unsqueeze(1), None, None
            )
        return rows_PD

    def _check_kernel(self, layer: int, held: _Layer, expert: int) -> None:
        """Compare one expert with the formula, on inputs large enough to be clamped."""
        checkpoint = self._checkpoint
        dtype, generator = activation_dtype(checkpoint), torch.Generator().manual_seed(0)
        exact = RoutedExperts.load(checkpoint, {layer: [expert]}, dtype=torch.float32, compiled=False)
        x_PD = torch.randn(CHECK_ROWS, checkpoint.shape.hidden_size, generator=generator)
        spread = exact.pre_activations(layer, expert, x_PD).std()
        x_PD = (x_PD * (3 * min(checkpoint.shape.swiglu_limit, 10.0) / spread)).to(dtype)
        expected = exact(layer, x_PD.float(), torch.full((CHECK_ROWS, 1), expert, dtype=torch.int32))
        slots_P = torch.full((CHECK_ROWS,), int(held.slot_E[expert]), dtype=torch.int32, device=self._device)
        got = self._rows(held, x_PD.to(self._device), slots_P)
        error = ((got.cpu().float() - expected).norm() / expected.norm()).item()
        if not error <= CHECK_TOLERANCE:
            raise ExpertError(
                f"vLLM's {_kernel_of(held)} gives other rows than expert {expert} of layer {layer}: relative error "
                f"{error:.2g}, {CHECK_TOLERANCE} at most (swiglu_limit {checkpoint.shape.swiglu_limit:g}, "
                f"{format_of(checkpoint, layer, expert).format}); serve these experts on CPU, or split less"
            )


@contextmanager
def _building() -> Iterator[None]:
    """vLLM's configuration for one layer: it keeps what is built under it alive, so it must not outlive the layer."""
    with set_current_vllm_config(VllmConfig()):
        yield


def _kernel_of(layer: _Layer) -> str:
    return type(layer.container.quant_method.moe_kernel.fused_experts).__name__
