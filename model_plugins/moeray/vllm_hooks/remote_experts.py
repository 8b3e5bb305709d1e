"""Routed experts that live elsewhere: vLLM's fused MoE with dispatch and combine in the place of the expert matrices.

vLLM keeps the router, the hash table, the correction bias and the shared expert; this module replaces the container of
the routed experts' weights (`RoutedExperts`) and its method. No weight is created, so none can be loaded.

GPU graphs (written from vLLM's code, not yet run on a GPU): the two host calls are breaks in a breakable CUDA graph
(`eager_break_during_capture`), so they run on every replay, while the shared expert between them stays inside the
graph. `combine` writes into a tensor that the caller owns, because a graph replays on fixed addresses. A FULL graph
would silently leave the host calls out; `engine_args` forces PIECEWISE.

Suffixes: T tokens, D hidden, K experts per token.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from vllm.compilation.breakable_cudagraph import eager_break_during_capture
from vllm.config import get_current_vllm_config
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.fused_moe.config import FUSED_MOE_UNQUANTIZED_CONFIG, FusedMoEQuantConfig
from vllm.model_executor.layers.fused_moe.fused_moe_method_base import FusedMoEMethodBase
from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts
from vllm.model_executor.layers.fused_moe.runner.shared_experts import SharedExperts, SharedExpertsOrder
from vllm.model_executor.models.utils import extract_layer_index

from moeray.vllm_hooks import micro_batches
from moeray.vllm_hooks.hop import Hop, hop
from moeray.vllm_hooks.settings import shard_settings


def _current_hop() -> Hop:
    """This process' one, or that of the half of a step that runs."""
    halves = micro_batches.state.running
    return hop if halves is None else halves.hop


def _is_dummy_run() -> bool:
    """Profile, warm-up and graph-capture runs have no attention metadata, and no expert group is asked."""
    return get_forward_context().attn_metadata is None


@eager_break_during_capture
def _dispatch(layer: int, x_TD: Tensor, expert_ids_TK: Tensor, weights_TK: Tensor) -> None:
    if _is_dummy_run():
        if not x_TD.is_cpu:
            hop.reserve(x_TD, expert_ids_TK.shape[1])
    else:
        _current_hop().dispatch(layer, x_TD.contiguous(), expert_ids_TK, weights_TK)


@eager_break_during_capture
def _combine_into(out_TD: Tensor) -> None:
    if _is_dummy_run():
        out_TD.zero_()
    else:
        out_TD.copy_(_current_hop().combine())


def _combine(x_TD: Tensor) -> Tensor:
    """The routed experts' contribution; on a device in a tensor of this graph, which is replayed with its addresses."""
    if x_TD.is_cpu and not _is_dummy_run():
        return _current_hop().combine()
    out_TD = torch.empty_like(x_TD)
    _combine_into(out_TD)
    return out_TD


class RemoteExpertsMethod(FusedMoEMethodBase):  # type: ignore[misc, unused-ignore]
    """dispatch -> shared expert -> combine."""

    # Makes vLLM's MoE runner hand the shared expert to `apply` instead of running it before.
    mk_can_overlap_shared_experts = True
    topk_indices_dtype = torch.int32

    def create_weights(self, layer: torch.nn.Module, *_: Any, **__: Any) -> None:
        """Nothing: the shard holds no routed expert."""

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        """Nothing was loaded."""

    def get_fused_moe_quant_config(self, layer: RoutedExperts) -> FusedMoEQuantConfig:
        return FUSED_MOE_UNQUANTIZED_CONFIG

    def apply(  # type: ignore[override, unused-ignore]
        self,
        layer: Any,
        x: Tensor,
        topk_weights: Tensor,
        topk_ids: Tensor,
        shared_experts: SharedExperts | None,
        shared_experts_input: Tensor | None,
    ) -> Tensor:
        """Routed experts' contribution [T, D]; the shared expert's result stays in `shared_experts`.

        Raises:
            TransportError: the hop could not mend it; it ends this EngineCore, and its text reaches the shard process.
        """
        used = _current_hop()  # now: when the other half has failed, it is that one's turn
        _dispatch(layer.model_layer, x, topk_ids, topk_weights)
        try:
            if shared_experts is not None:
                shared_experts(shared_experts_input, SharedExpertsOrder.MK_INTERNAL_OVERLAPPED)
            if micro_batches.state.running is not None:
                _let_other_half_run(micro_batches.state.running, shared_experts)
            return _combine(x)
        except BaseException:
            used.abandon()
            if shared_experts is not None:  # or the next call of this layer would find a result that nobody took
                shared_experts._output = [None] * len(shared_experts._output)
            raise


def _let_other_half_run(halves: micro_batches.Halves, shared_experts: SharedExperts | None) -> None:
    """It computes this layer's shared expert, too: this half's result must not lie where it puts its own."""
    if shared_experts is None:
        halves.hand_over()
        return
    kept, shared_experts._output = shared_experts._output, [None] * len(shared_experts._output)
    halves.hand_over()
    shared_experts._output = kept


@RoutedExperts.register_oot(name="RoutedExperts")
class RemoteRoutedExperts(RoutedExperts):  # type: ignore[misc, unused-ignore]
    """vLLM's container of routed experts, empty. Without moeray's settings it is vLLM's own."""

    model_layer: int

    def _get_quant_method(self, prefix: str, quant_config: Any, moe_config: Any) -> FusedMoEMethodBase:
        if shard_settings(get_current_vllm_config()) is None:
            return super()._get_quant_method(prefix, quant_config, moe_config)
        self.model_layer = extract_layer_index(prefix)
        return RemoteExpertsMethod(moe_config)
