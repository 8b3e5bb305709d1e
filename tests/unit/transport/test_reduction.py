"""The reduction gives the same bits whatever batch a token is in."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from moeray.transport.reduction import weighted_sum


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(
    ("num_tokens", "top_k", "hidden"), [(1, 1, 7), (5, 2, 33), (64, 6, 130), (3, 16, 64), (0, 2, 8)]
)
def test_it_is_the_fp32_sum_in_ascending_k(dtype: torch.dtype, num_tokens: int, top_k: int, hidden: int) -> None:
    torch.manual_seed(num_tokens)
    rows_PD = torch.randn(num_tokens * top_k, hidden).to(dtype)
    weights_TK = torch.rand(num_tokens, top_k)
    rows, weights = rows_PD.float().numpy().reshape(num_tokens, top_k, hidden), weights_TK.numpy()
    total = np.zeros((num_tokens, hidden), dtype=np.float32)
    for k in range(top_k):
        product = (rows[:, k] * weights[:, k : k + 1]).astype(np.float32)
        total = product if k == 0 else (total + product).astype(np.float32)
    y_TD = weighted_sum(rows_PD, weights_TK)
    assert y_TD.dtype == dtype
    assert torch.equal(y_TD, torch.from_numpy(total).to(dtype))


def test_a_token_alone_gives_the_bits_it_gives_in_a_batch() -> None:
    torch.manual_seed(1)
    rows_PD, weights_TK = torch.randn(9 * 6, 77).bfloat16(), torch.rand(9, 6)
    together = weighted_sum(rows_PD, weights_TK)
    for t in range(9):
        assert torch.equal(weighted_sum(rows_PD[t * 6 : t * 6 + 6], weights_TK[t : t + 1])[0], together[t])


def test_its_arguments_stay_as_they_are() -> None:
    rows_PD, weights_TK = torch.randn(4, 8), torch.rand(2, 2)
    copies = rows_PD.clone(), weights_TK.clone()
    weighted_sum(rows_PD, weights_TK)
    assert torch.equal(rows_PD, copies[0])
    assert torch.equal(weights_TK, copies[1])
