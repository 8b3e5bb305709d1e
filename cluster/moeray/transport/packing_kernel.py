"""One pass over a layer call's routing that writes every group's message: header, rows and ids, where it will lie.

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
from moeray.transport.wire import HEADER_BYTES, Flags

ROWS, PAIRS, BEGIN, BYTES = range(4)
"""Columns of counts_NC: rows sent, pairs sent, where the group's message begins, and its length."""
EXACT = int(Flags.EXACT)


def _pack(
    ids_TK: Any, owner_E: Any, x_TB: Any, header_W: Any, status_rows: int, memory: Any, counts_NC: Any, source_P: Any
) -> bool:
    """Pack one batch into exact messages, one after the other; see wire.py for the layout.

    Args:
        header_W: its first four words: magic, generation, sequence, layer; the rest is filled in per group.
        memory: the messages' memory as uint8, int32 and int64.
        counts_NC: written, see ROWS.
        source_P: written: the row of each pair's answer in the matrix of all replies.
    Returns:
        False if an id is outside 0..E-1; nothing of use is written then.
    """
    num_tokens, top_k = ids_TK.shape
    num_groups, row_bytes = len(counts_NC), x_TB.shape[1]
    bytes_, words, longs = memory
    last_N = np.full(num_groups, -1, dtype=np.int64)
    counts_NC[:] = 0
    for t in range(num_tokens):
        for k in range(top_k):
            if not 0 <= ids_TK[t, k] < len(owner_E):
                return False
            group = owner_E[ids_TK[t, k]]
            counts_NC[group, PAIRS] += 1
            if last_N[group] != t:
                last_N[group] = t
                counts_NC[group, ROWS] += 1
    # Where each group's next row and ids go, and its next answer in the replies.
    row_at_N = np.empty(num_groups, dtype=np.int64)
    ids_at_N, answer_N = np.empty_like(row_at_N), np.empty_like(row_at_N)
    begin = answer = 0
    for group in range(num_groups):
        num_rows, num_pairs = counts_NC[group, ROWS], counts_NC[group, PAIRS]
        for word in range(4):
            longs[begin // 8 + word] = header_W[word]
        longs[begin // 8 + 4], longs[begin // 8 + 5], longs[begin // 8 + 6] = num_rows, num_pairs, num_pairs
        longs[begin // 8 + 7] = EXACT
        row_at_N[group] = begin + HEADER_BYTES
        ids_begin = row_at_N[group] + (num_rows * row_bytes + 63) // 64 * 64
        ids_at_N[group] = ids_begin // 4 - top_k
        end = ids_begin + (num_rows * top_k * 4 + 63) // 64 * 64
        counts_NC[group, BEGIN], counts_NC[group, BYTES] = begin, end - begin
        begin = end
        answer_N[group] = answer + status_rows
        answer += status_rows + num_pairs
        last_N[group] = -1
    for t in range(num_tokens):
        for k in range(top_k):
            expert = ids_TK[t, k]
            group = owner_E[expert]
            if last_N[group] != t:
                last_N[group] = t
                bytes_[row_at_N[group] : row_at_N[group] + row_bytes] = x_TB[t]
                row_at_N[group] += row_bytes
                ids_at_N[group] += top_k
                words[ids_at_N[group] : ids_at_N[group] + top_k] = -1
            words[ids_at_N[group] + k] = expert
            source_P[t * top_k + k] = answer_N[group]
            answer_N[group] += 1
    return True


@cache
def pack_kernel() -> Callable[..., bool]:
    """Compiled, or taken from disk."""
    integer = types.int64
    memory = types.Tuple((types.uint8[::1], types.int32[::1], types.int64[::1]))
    signature = (
        types.int32[:, ::1], integer[::1], types.uint8[:, ::1], integer[::1], integer, memory, integer[:, ::1],
        integer[::1],
    )  # fmt: skip
    return compiled(_pack, signature)
