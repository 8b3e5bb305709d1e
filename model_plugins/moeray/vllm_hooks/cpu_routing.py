"""DeepSeek-V4's router on CPU for any number of experts and any top-k.

vLLM's CPU kernels accept 64, 128, 256 or 384 experts with top-k 6 or 8. Measured against the rest of a step the
PyTorch version costs nothing that matters.

Suffixes: T tokens, E experts, K experts per token, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

# transformers' and DeepSeek's own code: keeps the sum of the chosen scores away from zero
_RENORMALISE_EPS = 1e-20


def install() -> None:
    """Replace the two-kernel function of vLLM's CPU router."""
    from vllm.model_executor.layers.fused_moe.router import cpu_router

    cpu_router._sqrtsoftplus_bias_topk = route


def route(
    router_logits: Tensor,
    top_k: int,
    renormalize: bool,
    e_score_correction_bias: Tensor | None,
    routed_scaling_factor: float,
    input_ids: Tensor | None,
    hash_indices_table: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Choose experts and their weights.

    Args:
        router_logits: [T, E].
        e_score_correction_bias: [E], steers the choice and not the weights; required without a table.
        hash_indices_table: [V, K] experts of each token id; then `input_ids` [T] choose, not the scores.
    Returns:
        fp32 [T, K] weights that sum to `routed_scaling_factor` (if renormalised), int32 [T, K] expert ids.
    Source: DeepSeek-V4 inference code; score = sqrt(softplus(logit)).
    """
    scores_TE = functional.softplus(router_logits.float()).sqrt()
    if hash_indices_table is not None:
        ids_TK = hash_indices_table[input_ids].long()
    else:
        assert e_score_correction_bias is not None
        ids_TK = torch.topk(scores_TE + e_score_correction_bias, top_k, dim=-1, sorted=False).indices
    weights_TK = scores_TE.gather(1, ids_TK)
    if renormalize:
        weights_TK = weights_TK / (weights_TK.sum(-1, keepdim=True) + _RENORMALISE_EPS)
    return (weights_TK * routed_scaling_factor).contiguous(), ids_TK.to(torch.int32).contiguous()
