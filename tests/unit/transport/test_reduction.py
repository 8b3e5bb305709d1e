"""The reduction gives the same bits whatever batch a token is in."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moeray.transport.errors import GroupFailed
from moeray.transport.reduction import require_finite, weighted_sum


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


def test_finite_rows_pass_although_their_sum_leaves_fp32() -> None:
    rows_PD = torch.full((4, 8), 3e38)
    y_TD = weighted_sum(rows_PD, torch.ones(4, 1))
    assert not y_TD.sum(dtype=torch.float32).isfinite()
    require_finite(y_TD, rows_PD, 0, torch.zeros(4, 1, dtype=torch.int32), lambda: torch.zeros(4, dtype=torch.int64))


def test_the_first_group_with_a_bad_row_is_named_with_its_experts_only() -> None:
    rows_PD = torch.ones(6, 4)
    rows_PD[[1, 2, 5], 3] = torch.tensor([float("nan"), float("inf"), float("nan")])
    ids_TK = torch.tensor([[7, 3], [4, 7], [1, 2]], dtype=torch.int32)
    groups_P = torch.tensor([2, 1, 2, 2, 0, 1])
    y_TD = weighted_sum(rows_PD, torch.ones(3, 2))
    with pytest.raises(GroupFailed, match=r"group 1 failed: layer 9: experts \[2, 3\] gave NaN"):
        require_finite(y_TD, rows_PD, 9, ids_TK, lambda: groups_P)


@given(st.integers(0, 5), st.integers(0, 7), st.sampled_from([float("nan"), float("inf"), float("-inf")]))
def test_one_bad_value_anywhere_is_found_whatever_its_weight(pair: int, column: int, value: float) -> None:
    rows_PD = torch.randn(6, 8).to(torch.bfloat16)
    rows_PD[pair, column] = value
    y_TD = weighted_sum(rows_PD, torch.zeros(3, 2))
    with pytest.raises(GroupFailed):
        require_finite(y_TD, rows_PD, 0, torch.zeros(3, 2, dtype=torch.int32), lambda: torch.zeros(6).long())
