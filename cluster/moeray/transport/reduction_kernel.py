"""The weighted sum of rows where they lie, in one pass on a CPU.

Suffixes: T tokens, D hidden, K experts per token, P = T * K pairs in row-major (token, k) order, R rows of all replies.
Everything compiled is in this file, because the copy on disk is renewed when this file changes.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
from numba import types

from moeray.transport.compiled import compiled

RUN = 4096
"""Columns summed at a time: their 32 KiB of fp32 stay in the core's first-level cache."""


def _combine_bf16(replies_RD: Any, source_P: Any, weights_TK: Any, y_TD: Any) -> int:
    """y[t] = sum over k of weights[t, k] * replies[source[t * K + k]], see `reduction.weighted_sum`.

    Args:
        replies_RD: bf16 as uint16.
        y_TD: written: bf16 as uint16.
    Returns:
        how many numbers of y are NaN or Inf.
    """
    num_tokens, top_k = weights_TK.shape
    num_bad = np.uint32(0)
    words = np.empty(RUN, dtype=np.uint32)
    floats, sums = words.view(np.float32), np.empty(RUN, dtype=np.float32)
    bits = sums.view(np.uint32)
    for t in range(num_tokens):
        for begin in range(0, y_TD.shape[1], RUN):
            count = min(RUN, y_TD.shape[1] - begin)
            for k in range(top_k):
                row, weight = replies_RD[source_P[t * top_k + k], begin : begin + count], weights_TK[t, k]
                for d in range(count):
                    words[d] = np.uint32(row[d]) << np.uint32(16)
                if k == 0:
                    for d in range(count):
                        sums[d] = floats[d] * weight
                else:
                    for d in range(count):
                        sums[d] += floats[d] * weight
            y = y_TD[t, begin : begin + count]
            for d in range(count):
                word = bits[d]
                rounded = (word + np.uint32(0x7FFF) + ((word >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
                is_nan = (word & np.uint32(0x7FFFFFFF)) > np.uint32(0x7F800000)
                rounded = np.uint32(0x7FC0) if is_nan else rounded
                num_bad += np.uint32((rounded & np.uint32(0x7F80)) == np.uint32(0x7F80))
                y[d] = np.uint16(rounded)
    return int(num_bad)


def _combine_fp32(replies_RD: Any, source_P: Any, weights_TK: Any, y_TD: Any) -> int:
    """As `_combine_bf16`, with nothing to widen or round."""
    num_tokens, top_k = weights_TK.shape
    num_bad = np.uint32(0)
    for t in range(num_tokens):
        for begin in range(0, y_TD.shape[1], RUN):
            count = min(RUN, y_TD.shape[1] - begin)
            sums = y_TD[t, begin : begin + count]
            for k in range(top_k):
                row, weight = replies_RD[source_P[t * top_k + k], begin : begin + count], weights_TK[t, k]
                if k == 0:
                    for d in range(count):
                        sums[d] = row[d] * weight
                else:
                    for d in range(count):
                        sums[d] += row[d] * weight
            bits = sums.view(np.uint32)
            for d in range(count):
                num_bad += np.uint32((bits[d] & np.uint32(0x7F800000)) == np.uint32(0x7F800000))
    return int(num_bad)


@cache
def combine_kernel(*, bf16: bool) -> Callable[[Any, Any, Any, Any], int]:
    """Compiled, or taken from disk."""
    rows = (types.uint16 if bf16 else types.float32)[:, ::1]
    signature = (rows, types.int64[::1], types.float32[:, ::1], rows)
    return compiled(_combine_bf16 if bf16 else _combine_fp32, signature)
