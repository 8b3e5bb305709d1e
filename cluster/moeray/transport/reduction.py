"""The one reduction that every transport shares, so that results are bit-equal whatever carried the rows.

Suffixes: T tokens, D hidden, K experts per token, P = T * K pairs in row-major (token, k) order.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

from moeray.transport.errors import GroupFailed, TransportError


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


def prepare(dtype: torch.dtype, device: torch.device) -> None:
    """Compile what `combine_rows` needs, so that the first request does not wait for it."""
    _kernel(dtype, device)


def combine_rows(replies_RD: Tensor, source_P: Tensor, weights_TK: Tensor) -> tuple[Tensor, bool]:
    """`weighted_sum` of rows where they lie, to the bit; on a CPU in one pass, without a copy of the rows.

    9 us at 8 tokens x 6 experts x 1024 bf16 on one core, where copy, sum and check took 56.

    Args:
        replies_RD: contiguous; may hold rows that no pair names.
        source_P: int64, the place in it of each pair's row, pairs in row-major (token, k) order; not checked.
        weights_TK: fp32.
    Returns:
        y_TD in the dtype of the replies, and whether all of it is finite; if not, `require_finite` finds who is to
        blame.
    """
    kernel = _kernel(replies_RD.dtype, replies_RD.device)
    if kernel is None:
        y_TD = weighted_sum(replies_RD.index_select(0, source_P), weights_TK)
        return y_TD, bool(y_TD.isfinite().all())
    y_TD = replies_RD.new_empty((weights_TK.shape[0], replies_RD.shape[1]))
    weights = weights_TK.contiguous().numpy()
    replies, y = (_as_numpy(each) for each in (replies_RD, y_TD))
    return y_TD, kernel(replies, source_P.numpy(), weights, y) == 0


@cache
def _kernel(dtype: torch.dtype, device: torch.device) -> Callable[[Any, Any, Any, Any], int] | None:
    if device.type != "cpu" or dtype not in (torch.bfloat16, torch.float32):
        return None
    from moeray.transport.reduction_kernel import combine_kernel  # brings numba

    return combine_kernel(bf16=dtype == torch.bfloat16)


def _as_numpy(rows: Tensor) -> NDArray[Any]:
    """NumPy has no bf16."""
    array: NDArray[Any] = (rows.view(torch.uint16) if rows.dtype == torch.bfloat16 else rows).numpy()
    return array


def require_finite(
    y_TD: Tensor, rows_PD: Tensor, layer: int, expert_ids_TK: Tensor, group_of_pairs: Callable[[], Tensor]
) -> None:
    """NaN or Inf must end the call: further on it would become text. A group checks its rows, but it may be broken.

    One sum of the result is the sieve: 7 to 32 us at 1 to 32 tokens of hidden 128 to 7168, where the hop takes 90 us
    and more. A finite sum has no non-finite term; only where it is not finite are the rows looked at.

    Args:
        y_TD: what `weighted_sum` made of the rows.
        group_of_pairs: gives [P] the group that computed each row; called only if there is something to blame.
    Raises:
        GroupFailed: rows are not finite; names the first group that sent such and its experts.
        TransportError: the rows are finite, but not the result: the shard's own router weights are at fault.
    """
    if y_TD.sum(dtype=torch.float32).isfinite().item():
        return
    bad_P = ~rows_PD.isfinite().all(dim=1)
    if bad_P.any():
        group_P = group_of_pairs().to(bad_P.device)
        group = int(group_P[bad_P].min())
        theirs_P = bad_P & (group_P == group)
        experts = sorted(set(expert_ids_TK.reshape(-1)[theirs_P].tolist()))
        raise GroupFailed(group, f"layer {layer}: experts {experts} gave NaN or Inf, and the group did not say so")
    if not y_TD.isfinite().all():  # else the sum alone left fp32's range
        raise TransportError(f"layer {layer}: the router's weights of this shard make NaN or Inf of finite rows")
