"""The one reduction that every transport shares, so that results are bit-equal whatever carried the rows."""

from __future__ import annotations

from torch import Tensor


def weighted_sum(rows_PD: Tensor, weights_TK: Tensor) -> Tensor:
    """y[t] = sum over k of weights[t, k] * rows[t * K + k].

    Products and sums are separate fp32 operations, k ascending: both are correctly rounded by IEEE 754, hence the
    same bits on every machine and for every T. (torch's own `sum` does not fix its order; a fused multiply-add
    would round differently where it exists.)

    Args:
        rows_PD: one row per pair in row-major (token, k) order, P = T * K.
        weights_TK: fp32.
    Returns:
        y_TD in the dtype of the rows.
    """
    num_tokens, top_k = weights_TK.shape
    rows_TKD = rows_PD.view(num_tokens, top_k, rows_PD.shape[1])
    # One k at a time: forming all products at once costs ten times as much once they outgrow the cache.
    y_TD = rows_TKD[:, 0].float() * weights_TK[:, :1]
    for k in range(1, top_k):
        y_TD += rows_TKD[:, k].float() * weights_TK[:, k : k + 1]
    return y_TD.to(rows_PD.dtype)
