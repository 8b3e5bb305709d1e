"""mHC weights of the training model, laid out for one CPU core.

The same numbers as transformers' ``DeepseekV4HyperConnection``; only the layout of the Sinkhorn
iterations differs: [H, H, T] instead of [B, S, H, H], so that sums over four streams are vector
additions over all tokens.

Shape suffixes: B batch, S sequence, T = B * S tokens, H streams, D hidden.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers.models.deepseek_v4 import modeling_deepseek_v4 as modeling

transformers_mixing = modeling.DeepseekV4HyperConnection.forward


def install() -> None:
    """Make every hyper-connection compute its weights with ``mixing_weights``."""
    modeling.DeepseekV4HyperConnection.forward = mixing_weights  # type: ignore[method-assign, assignment]


def mixing_weights(connection: Any, streams_BSHD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return (post [B, S, H], comb [B, S, H, H], collapsed [B, S, D]) of one block."""
    batch, length, hc, _ = streams_BSHD.shape
    flat_TX = connection.input_norm(streams_BSHD.reshape(batch * length, -1).float())
    mixed_WT = functional.linear(flat_TX, connection.fn).float().t().contiguous()
    pre_HT, post_HT, comb_XT = mixed_WT[:hc], mixed_WT[hc : 2 * hc], mixed_WT[2 * hc :]
    base_W1 = connection.base[:, None]
    pre_b, post_b, comb_b = base_W1[:hc], base_W1[hc : 2 * hc], base_W1[2 * hc :]
    pre_scale, post_scale, comb_scale = connection.scale.unbind(0)
    pre_HT = torch.sigmoid(pre_HT * pre_scale + pre_b) + connection.hc_eps
    post_HT = 2 * torch.sigmoid(post_HT * post_scale + post_b)
    comb_HHT = (comb_XT * comb_scale + comb_b).view(hc, hc, -1)
    comb_HHT = doubly_stochastic(comb_HHT, connection.hc_sinkhorn_iters, connection.hc_eps)
    pre_BSH = pre_HT.t().view(batch, length, hc)
    collapsed = (pre_BSH[..., None] * streams_BSHD).sum(2).to(streams_BSHD.dtype)
    post_BSH = post_HT.t().view(batch, length, hc)
    return post_BSH, comb_HHT.permute(2, 0, 1).reshape(batch, length, hc, hc), collapsed


def doubly_stochastic(logits_HHT: Tensor, iterations: int, eps: float) -> Tensor:
    """Sinkhorn-Knopp: softmax over the second axis, then normalise columns and rows in turn."""
    comb = logits_HHT.softmax(1) + eps
    comb = comb / (comb.sum(0, keepdim=True) + eps)
    for _ in range(iterations - 1):
        comb = comb / (comb.sum(1, keepdim=True) + eps)
        comb = comb / (comb.sum(0, keepdim=True) + eps)
    return comb
