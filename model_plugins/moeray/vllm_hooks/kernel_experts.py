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
from collections.abc import Mapping, Sequence
from time import perf_counter
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.model_executor.layers.fused_moe.layer import FusedMoEFactory
from vllm.model_executor.layers.fused_moe.router.custom_routing_router import CustomRoutingRouter
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig
from vllm.model_executor.layers.quantization.fp8 import Fp8Config
from vllm.model_executor.layers.quantization.mxfp4 import Mxfp4Config
from vllm.v1.worker.workspace import init_workspace_manager, is_workspace_manager_initialized

from moeray.deepseek_v4.checkpoint import Checkpoint
from moeray.deepseek_v4.errors import CheckpointError, ExpertError
from moeray.deepseek_v4.experts import Progress, RoutedExperts, RowCounts, require_finite
from moeray.deepseek_v4.formats import StoredMatrix
from moeray.deepseek_v4.names import PARTS
from moeray.deepseek_v4.tensor_reader import TensorReader, activation_dtype

# A kernel may quantise the activations (FP8: 2^-4 per element); a missing clamp is wrong by the size of the rows.
CHECK_ROWS, CHECK_TOLERANCE = 4, 0.1


class KernelExperts:
    """See module docstring. Calls from several threads are serialised: the kernels share vLLM's workspace."""

    def __init__(self, layers: Mapping[int, Any], held: Mapping[int, Sequence[int]], counts: RowCounts) -> None:
        self._layers = layers
        self._held = {layer: tuple(sorted(experts)) for layer, experts in held.items()}
        self._slots_LE = np.full_like(counts.rows(), -1, dtype=np.int32)
        for layer, experts in self._held.items():
            self._slots_LE[layer, list(experts)] = np.arange(len(experts))
        self._counts = counts
        self._lock = threading.Lock()
        self.bytes_read = 0
        self.load_seconds = 0.0

    @classmethod
    def load(
        cls,
        checkpoint: Checkpoint,
        experts_per_layer: Mapping[int, Sequence[int]],
        on_progress: Progress | None = None,
        *,
        device: torch.device,
    ) -> KernelExperts:
        """Read these experts' byte ranges and nothing else, in their stored format.

        Args:
            experts_per_layer: model layer -> logical experts to hold.
        Raises:
            CheckpointError: a file became unreadable, or vLLM has no kernel for the format on this device.
            ExpertError: the kernel vLLM chose does not compute what the formula says.
        """
        started, shape = perf_counter(), checkpoint.shape
        if device.type != "cpu" and not is_workspace_manager_initialized():
            init_workspace_manager(device)
        total = checkpoint.bytes_of(
            name for layer, experts in experts_per_layer.items() for name in checkpoint.expert_names(layer, experts)
        )
        layers: dict[int, Any] = {}
        with TensorReader() as reader, set_current_vllm_config(VllmConfig()):
            for layer, experts in experts_per_layer.items():
                with torch.device(device):
                    layers[layer] = _new_layer(checkpoint, layer, sorted(experts))
                for slot, expert in enumerate(sorted(experts)):
                    _fill(layers[layer], reader, checkpoint, layer, expert, slot)
                    if on_progress is not None:
                        on_progress(reader.bytes_read, total)
                layers[layer].quant_method.process_weights_after_loading(layers[layer])
            loaded = cls(layers, experts_per_layer, RowCounts(shape.num_layers, shape.num_experts))
            loaded.bytes_read = reader.bytes_read
        loaded._check_kernel(checkpoint, device)
        loaded.load_seconds = perf_counter() - started
        return loaded

    @property
    def held(self) -> dict[int, tuple[int, ...]]:
        """Model layer -> logical experts held, ascending."""
        return dict(self._held)

    @property
    def weight_bytes(self) -> int:
        """Device memory of the weights, as the kernels keep them."""
        return sum(each.nbytes for layer in self._layers.values() for each in layer.parameters())

    @property
    def kernel(self) -> str:
        """Name of vLLM's kernel class."""
        return type(next(iter(self._layers.values())).quant_method.moe_kernel.fused_experts).__name__

    def tokens(self) -> NDArray[np.int64]:
        """[num_layers, num_experts] rows computed since the start (a copy)."""
        return self._counts.rows()

    def __call__(self, layer: int, x_TD: Tensor, expert_ids_TK: Tensor) -> Tensor:
        """See `moeray.transport.interface.ExpertCompute`.

        Raises:
            ExpertError: an expert that is not held, or a non-finite row.
        """
        ids = expert_ids_TK.cpu().numpy()
        pairs = np.flatnonzero(ids.ravel() >= 0)
        experts = ids.ravel()[pairs]
        slots = self._slots_LE[layer, experts]
        if (slots < 0).any():
            raise ExpertError(f"experts {sorted(set(experts[slots < 0].tolist()))} of layer {layer} are not held here")
        if not len(pairs):
            return x_TD.new_empty((0, x_TD.shape[1]))
        x_PD = x_TD.index_select(0, torch.from_numpy(pairs // ids.shape[1]).to(x_TD.device))
        rows_PD = self._rows(layer, x_PD, torch.from_numpy(slots).to(x_TD.device))
        require_finite(layer, x_TD, rows_PD, experts)
        self._counts.add(layer, experts)
        return rows_PD

    def _rows(self, layer: int, x_PD: Tensor, slots_P: Tensor) -> Tensor:
        experts = self._layers[layer]
        weights_P1 = torch.ones((len(slots_P), 1), dtype=torch.float32, device=x_PD.device)
        with self._lock:
            rows_PD: Tensor = experts.quant_method.apply(experts, x_PD, weights_P1, slots_P.unsqueeze(1), None, None)
        return rows_PD

    def _check_kernel(self, checkpoint: Checkpoint, device: torch.device) -> None:
        """Compare one expert of every layer with the formula, on inputs large enough to be clamped."""
        dtype, generator = activation_dtype(checkpoint), torch.Generator().manual_seed(0)
        for layer, experts in self._held.items():
            exact = RoutedExperts.load(checkpoint, {layer: experts[:1]}, dtype=torch.float32, compiled=False)
            x_PD = torch.randn(CHECK_ROWS, checkpoint.shape.hidden_size, generator=generator)
            spread = exact.pre_activations(layer, experts[0], x_PD).std()
            x_PD = (x_PD * (3 * min(checkpoint.shape.swiglu_limit, 10.0) / spread)).to(dtype)
            expected = exact(layer, x_PD.float(), torch.full((CHECK_ROWS, 1), experts[0], dtype=torch.int32))
            got = self._rows(layer, x_PD.to(device), torch.zeros(CHECK_ROWS, dtype=torch.int32, device=device))
            error = ((got.cpu().float() - expected).norm() / expected.norm()).item()
            if not error <= CHECK_TOLERANCE:
                raise ExpertError(
                    f"vLLM's {self.kernel} gives other rows than expert {experts[0]} of layer {layer}: relative error "
                    f"{error:.2g}, {CHECK_TOLERANCE} at most (swiglu_limit {checkpoint.shape.swiglu_limit:g}, "
                    f"{_format_of(checkpoint, layer, experts[0]).format}); serve these experts on CPU, or split less"
                )


def _format_of(checkpoint: Checkpoint, layer: int, expert: int) -> StoredMatrix:
    formats = {checkpoint.expert_matrix(layer, expert, part).format for part in PARTS}
    first = checkpoint.expert_matrix(layer, expert, PARTS[0])
    if len(formats) > 1:
        raise CheckpointError(
            first.weight.file,
            f"expert {expert} of layer {layer} mixes {', '.join(sorted(formats))}",
            "vLLM's kernels take one format per layer",
        )
    return first


def _new_layer(checkpoint: Checkpoint, layer: int, experts: Sequence[int]) -> Any:
    """vLLM's container of `len(experts)` experts, with the method and kernel that vLLM chooses.

    Custom routing keeps vLLM from choosing a kernel that routes by itself.
    """
    shape, matrix = checkpoint.shape, _format_of(checkpoint, layer, experts[0])
    dtype = activation_dtype(checkpoint)
    try:
        runner = FusedMoEFactory(
            num_experts=len(experts),
            top_k=1,
            hidden_size=shape.hidden_size,
            intermediate_size=shape.intermediate_size,
            params_dtype=dtype,
            quant_config=_quantisation(matrix),
            tp_size=1,
            dp_size=1,
            pcp_size=1,
            prefix=f"moeray.layers.{layer}.experts",
            router=CustomRoutingRouter(
                top_k=1, global_num_experts=len(experts), custom_routing_function=_no_routing, renormalize=False
            ),
            swiglu_limit=None if np.isinf(shape.swiglu_limit) else shape.swiglu_limit,
        )
    except (NotImplementedError, ValueError) as error:
        raise CheckpointError(
            matrix.weight.file,
            f"vLLM has no MoE kernel on this device for {matrix.format} experts: {error}",
            "use another device, or expert groups on CPU (experts.num_gpus: 0)",
        ) from error
    container = runner.routed_experts
    if container.quant_method.is_monolithic:
        raise CheckpointError(
            matrix.weight.file,
            f"vLLM's kernel for {matrix.format} experts on this device routes by itself",
            "choose another with vLLM's VLLM_MOE settings, or use expert groups on CPU (experts.num_gpus: 0)",
        )
    return container


def _no_routing(*_: object, **__: object) -> tuple[Tensor, Tensor]:
    raise AssertionError("the attention shard has routed already")


def _quantisation(matrix: StoredMatrix) -> QuantizationConfig | None:
    if matrix.scale is None or matrix.block is None:
        return None
    if matrix.weight.dtype != "F8_E4M3":
        return Mxfp4Config()
    config = Fp8Config(
        is_checkpoint_fp8_serialized=True, activation_scheme="dynamic", weight_block_size=list(matrix.block)
    )
    config.is_scale_e8m0 = matrix.scale.dtype == "F8_E8M0"  # type: ignore[attr-defined, unused-ignore]
    return config


def _fill(container: Any, reader: TensorReader, checkpoint: Checkpoint, layer: int, expert: int, slot: int) -> None:
    """Hand one expert's stored tensors to vLLM's own weight loader, which knows each kernel's layout."""
    for part in PARTS:
        matrix = checkpoint.expert_matrix(layer, expert, part)
        fused = "w2" if part == "w2" else "w13"
        parameters = {f"{fused}_weight": matrix.weight}
        if matrix.scale is not None:
            name = next(each for each, _ in container.named_parameters() if each.startswith(f"{fused}_weight_scale"))
            parameters[name] = matrix.scale
        for name, stored in parameters.items():
            parameter, tensor = getattr(container, name), reader.read([stored])
            if parameter.dtype == torch.uint8 and tensor.dtype != torch.uint8:
                tensor = tensor.view(torch.uint8)  # packed values and e8m0 scales are bytes, not numbers
            loaded = parameter.weight_loader(
                parameter, tensor, weight_name=name, shard_id=part, expert_id=slot, return_success=True
            )
            if not loaded:
                raise ExpertError(f"vLLM did not take {stored.name}")
