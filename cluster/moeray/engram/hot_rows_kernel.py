"""Which slot of a bounded cache has a row: sets of WAYS slots, in each of them the CLOCK rule says who goes.

Suffixes: N rows, S sets, W slots of a set. Everything compiled is in this file, because the copy on disk is renewed
when this file changes.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
from numba import types

from moeray.transport.compiled import compiled

WAYS = 8
EMPTY = -1
"""In place of a row."""


def _find(rows_N: Any, rows_SW: Any, used_SW: Any, slots_N: Any) -> int:
    """Where each row is.

    Args:
        slots_N: written; -1 for a row that is nowhere.
    Returns:
        how many are somewhere.
    """
    num_sets, ways = rows_SW.shape
    found = 0
    for n in range(len(rows_N)):
        # Multiplied by the golden ratio: rows of one column differ in their low bits, as do those of its neighbours.
        mixed = np.uint64(rows_N[n]) * np.uint64(0x9E3779B97F4A7C15)
        s = np.int64((mixed >> np.uint64(24)) % np.uint64(num_sets))
        slots_N[n] = -1
        for w in range(ways):
            if rows_SW[s, w] == rows_N[n]:
                used_SW[s, w] = 1
                slots_N[n] = s * ways + w
                found += 1
                break
    return found


def _admit(rows_N: Any, rows_SW: Any, used_SW: Any, hands_S: Any, slots_N: Any) -> int:
    """Give each row a slot; a later one may get the slot of an earlier one.

    Args:
        hands_S: slot of each set that is looked at next.
        slots_N: written.
    Returns:
        how many rows had to go.
    """
    num_sets, ways = rows_SW.shape
    gone = 0
    for n in range(len(rows_N)):
        mixed = np.uint64(rows_N[n]) * np.uint64(0x9E3779B97F4A7C15)
        s = np.int64((mixed >> np.uint64(24)) % np.uint64(num_sets))
        at = -1
        for w in range(ways):
            if rows_SW[s, w] == rows_N[n]:
                at = w
        if at < 0:
            while used_SW[s, hands_S[s]] != 0:
                used_SW[s, hands_S[s]] = 0
                hands_S[s] = (hands_S[s] + 1) % ways
            at = hands_S[s]
            hands_S[s] = (at + 1) % ways
            if rows_SW[s, at] != -1:
                gone += 1
            rows_SW[s, at] = rows_N[n]
        slots_N[n] = s * ways + at
    return gone


@cache
def find_kernel() -> Callable[[Any, Any, Any, Any], int]:
    """Compiled, or taken from disk."""
    return compiled(_find, (types.int64[::1], types.int64[:, ::1], types.uint8[:, ::1], types.int64[::1]))


@cache
def admit_kernel() -> Callable[[Any, Any, Any, Any, Any], int]:
    """Compiled, or taken from disk."""
    rows, sets = types.int64[::1], types.int64[:, ::1]
    return compiled(_admit, (rows, sets, types.uint8[:, ::1], types.int64[::1], rows))
