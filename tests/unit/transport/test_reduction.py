"""The reduction gives the same bits whatever batch a token is in."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moeray.transport.errors import GroupFailed
from moeray.transport.reduction import combine_rows, require_finite, weighted_sum


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


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@given(
    num_tokens=st.integers(0, 9),
    top_k=st.integers(1, 16),
    hidden=st.sampled_from([1, 7, 33, 64, 130, 4096, 4100]),
    seed=st.integers(0, 1000),
)
@settings(max_examples=60, deadline=None)
def test_rows_combined_where_they_lie_give_the_bits_of_the_weighted_sum(
    dtype: torch.dtype, num_tokens: int, top_k: int, hidden: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    num_pairs = num_tokens * top_k
    replies_RD = torch.full((num_pairs + 3, hidden), torch.nan).to(dtype)  # what no pair names is not looked at
    source_P = torch.randperm(num_pairs + 3, generator=generator)[:num_pairs]
    rows_PD = (torch.randn(num_pairs, hidden, generator=generator) * 10.0 ** (seed % 30 - 15)).to(dtype)
    replies_RD[source_P] = rows_PD
    weights_TK = torch.rand(num_tokens, top_k, generator=generator)
    y_TD, finite = combine_rows(replies_RD, source_P, weights_TK)
    assert finite
    assert y_TD.dtype == dtype
    assert torch.equal(y_TD, weighted_sum(rows_PD, weights_TK))


def test_combining_takes_two_roundings_per_expert_and_fuses_none() -> None:
    """1 + 2^-12 squared needs 25 bits: a fused multiply-add would keep what the product alone loses."""
    x = 1 + 2.0**-12
    replies_RD = torch.tensor([[-1.0], [x]]).repeat(1, 64)
    y_TD, _ = combine_rows(replies_RD, torch.arange(2), torch.tensor([[1.0, x]]))
    assert (y_TD == float(np.float32(np.float64(x) * x)) - 1).all()
    assert float(np.float32(np.float64(x) * x)) != x * x


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@given(
    pair=st.integers(0, 5),
    column=st.integers(0, 69),
    value=st.sampled_from([float("nan"), float("inf"), float("-inf")]),
    weight=st.sampled_from([0.0, 0.5]),
)
def test_one_bad_value_makes_the_combined_rows_not_finite(
    dtype: torch.dtype, pair: int, column: int, value: float, weight: float
) -> None:
    replies_RD = torch.randn(6, 70).to(dtype)
    replies_RD[pair, column] = value
    y_TD, finite = combine_rows(replies_RD, torch.arange(6), torch.full((3, 2), weight))
    assert not finite
    assert torch.equal(y_TD.isnan(), weighted_sum(replies_RD, torch.full((3, 2), weight)).isnan())


def test_what_overflows_by_rounding_to_bf16_is_not_finite() -> None:
    largest = torch.finfo(torch.bfloat16).max
    replies_RD = torch.full((2, 4), largest).bfloat16()
    for small, rounds_down in ((2.0**-9, True), (2.0**-8, False)):
        y_TD, finite = combine_rows(replies_RD, torch.arange(2), torch.tensor([[1.0, small]]))
        assert finite == rounds_down
        assert (y_TD == (largest if rounds_down else torch.inf)).all()
