"""One pass over a layer call's routing that writes every group's header, rows and ids where its message will lie.

Suffixes: T tokens, K experts per token, P = T * K pairs in row-major order, N groups, E experts, W words of a header,
B bytes of a dispatched row. Everything compiled is in this file, because the copy on disk is renewed when it changes.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
from numba import types

from moeray.transport.compiled import compiled

ROWS, PAIRS, LARGE_BEGIN, LARGE_BYTES = range(4)
"""Columns of counts_NC: rows sent, pairs sent, where the payload of rows that are not inline begins, its bytes or 0."""


def _pack(
    ids_TK: Any,
    owner_E: Any,
    x_TB: Any,
    header_W: Any,
    inline_rows: int,
    status_rows: int,
    blocks: Any,
    large: Any,
    counts_NC: Any,
    source_P: Any,
) -> bool:
    """Pack one batch; see `packing.route_on_host` for what goes where, and wire.py for the layout.

    Args:
        header_W: generation, sequence and layer are set; the rest is filled in per group.
        blocks, large: (uint8, int32, int64) views of [N, bytes] and [1, bytes].
        counts_NC: written, see ROWS.
        source_P: written: the row of each pair's answer in the matrix of all replies.
    Returns:
        False if an id is outside 0..E-1; nothing of use is written then.
    """
    num_tokens, top_k = ids_TK.shape
    num_groups, row_bytes = len(counts_NC), x_TB.shape[1]
    blocks_u8, blocks_i32, blocks_i64 = blocks
    large_u8, large_i32, _ = large
    last_N = np.full(num_groups, -1, dtype=np.int64)
    counts_NC[:] = 0
    for t in range(num_tokens):
        for k in range(top_k):
            if not 0 <= ids_TK[t, k] < len(owner_E):
                return False
            group = owner_E[ids_TK[t, k]]
            counts_NC[group, 1] += 1
            if last_N[group] != t:
                last_N[group] = t
                counts_NC[group, 0] += 1
    # Where each group's rows and ids begin in its memory, and its answers in the replies.
    rows_at_N = np.empty(num_groups, dtype=np.int64)
    ids_at_N, answer_N = np.empty_like(rows_at_N), np.empty_like(rows_at_N)
    large_end = answer = 0
    for group in range(num_groups):
        num_rows, num_pairs = counts_NC[group, 0], counts_NC[group, 1]
        is_large = num_rows > inline_rows
        begin = large_end if is_large else 64
        capacity = num_rows if is_large else inline_rows
        rows_at_N[group] = begin
        ids_at_N[group] = begin + (capacity * row_bytes + 63) // 64 * 64
        if is_large:
            large_end = ids_at_N[group] + (num_rows * top_k * 4 + 63) // 64 * 64
            counts_NC[group, 2], counts_NC[group, 3] = begin, large_end - begin
        for word in range(4):
            blocks_i64[group, word] = header_W[word]
        blocks_i64[group, 4], blocks_i64[group, 5], blocks_i64[group, 6] = num_rows, num_pairs, num_pairs
        blocks_i64[group, 7] = 1 if is_large else 0
        answer_N[group] = answer + status_rows
        answer += status_rows + num_pairs
        last_N[group] = -1
    row_N = np.full(num_groups, -1, dtype=np.int64)
    for t in range(num_tokens):
        for k in range(top_k):
            expert = ids_TK[t, k]
            group = owner_E[expert]
            is_large = counts_NC[group, 3] > 0
            bytes_, words = (large_u8[0], large_i32[0]) if is_large else (blocks_u8[group], blocks_i32[group])
            first = last_N[group] != t
            if first:
                last_N[group] = t
                row_N[group] += 1
                at = rows_at_N[group] + row_N[group] * row_bytes
                bytes_[at : at + row_bytes] = x_TB[t]
            at = ids_at_N[group] // 4 + row_N[group] * top_k
            if first:
                words[at : at + top_k] = -1
            words[at + k] = expert
            source_P[t * top_k + k] = answer_N[group]
            answer_N[group] += 1
    return True


@cache
def pack_kernel() -> Callable[..., bool]:
    """Compiled, or taken from disk."""
    views = types.Tuple((types.uint8[:, ::1], types.int32[:, ::1], types.int64[:, ::1]))
    integer = types.int64
    signature = (
        types.int32[:, ::1],
        integer[::1],
        types.uint8[:, ::1],
        integer[::1],
        integer,
        integer,
        views,
        views,
        integer[:, ::1],
        integer[::1],
    )
    return compiled(_pack, signature)
