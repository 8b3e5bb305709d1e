"""One layer's experts as vLLM's fused MoE kernels keep them: made with the kernel that vLLM chooses, filled from files.

See `kernel_experts`.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from vllm.model_executor.layers.fused_moe.layer import FusedMoEFactory
from vllm.model_executor.layers.fused_moe.router.custom_routing_router import CustomRoutingRouter
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig
from vllm.model_executor.layers.quantization.fp8 import Fp8Config
from vllm.model_executor.layers.quantization.mxfp4 import Mxfp4Config

from moeray.deepseek_v4.checkpoint import Checkpoint
from moeray.deepseek_v4.errors import CheckpointError, ExpertError
from moeray.deepseek_v4.formats import StoredMatrix
from moeray.deepseek_v4.names import PARTS
from moeray.deepseek_v4.tensor_reader import TensorReader, activation_dtype

_pieces = itertools.count()
"""vLLM wants every layer's name to be new."""


def format_of(checkpoint: Checkpoint, layer: int, expert: int) -> StoredMatrix:
    formats = {checkpoint.expert_matrix(layer, expert, part).format for part in PARTS}
    first = checkpoint.expert_matrix(layer, expert, PARTS[0])
    if len(formats) > 1:
        raise CheckpointError(
            first.weight.file,
            f"expert {expert} of layer {layer} mixes {', '.join(sorted(formats))}",
            "vLLM's kernels take one format per layer",
        )
    return first


def new_container(checkpoint: Checkpoint, layer: int, experts: Sequence[int]) -> Any:
    """vLLM's container of `len(experts)` experts, with the method and kernel that vLLM chooses.

    Custom routing keeps vLLM from choosing a kernel that routes by itself.
    """
    shape, matrix = checkpoint.shape, format_of(checkpoint, layer, experts[0])
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
            prefix=f"moeray.layers.{layer}.experts.{next(_pieces)}",
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


def fill(container: Any, reader: TensorReader, checkpoint: Checkpoint, layer: int, expert: int, slot: int) -> None:
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
