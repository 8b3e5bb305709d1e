"""The router against its definition, for shapes that vLLM's own CPU kernels refuse."""

from __future__ import annotations

import math

import pytest
import torch

from moeray.vllm_hooks.cpu_routing import route


def score(logit: float) -> float:
    return math.sqrt(math.log1p(math.exp(logit)))


@pytest.mark.parametrize(("num_experts", "top_k"), [(16, 2), (24, 5), (64, 16)])
def test_scores_plus_bias_choose_and_scores_alone_weigh(num_experts: int, top_k: int) -> None:
    g = torch.Generator().manual_seed(num_experts)
    logits, bias = torch.randn(7, num_experts, generator=g), torch.randn(num_experts, generator=g)
    weights, ids = route(logits, top_k, True, bias, 1.5, None, None)
    assert (weights.dtype, ids.dtype) == (torch.float32, torch.int32)
    for t in range(7):
        scores = [score(x) for x in logits[t].tolist()]
        chosen = sorted(range(num_experts), key=lambda e: scores[e] + float(bias[e]), reverse=True)[:top_k]
        assert sorted(ids[t].tolist()) == sorted(chosen)
        total = sum(scores[e] for e in chosen)
        assert weights[t].tolist() == pytest.approx([1.5 * scores[e] / total for e in ids[t].tolist()], rel=1e-5)


def test_a_hash_layer_is_routed_by_the_token_and_not_by_the_scores() -> None:
    table = torch.tensor([[0, 1], [3, 2], [1, 3]], dtype=torch.int32)
    logits = torch.randn(4, 4, generator=torch.Generator().manual_seed(0))
    weights, ids = route(logits, 2, True, None, 2.0, torch.tensor([2, 0, 1, 2]), table)
    assert ids.tolist() == [[1, 3], [0, 1], [3, 2], [1, 3]]
    assert weights.sum(1).tolist() == pytest.approx([2.0] * 4)


def test_no_token_is_legal() -> None:
    weights, ids = route(torch.zeros(0, 8), 2, True, torch.zeros(8), 1.0, None, None)
    assert weights.shape == ids.shape == (0, 2)
