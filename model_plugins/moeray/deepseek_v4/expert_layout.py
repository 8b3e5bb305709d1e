"""Which pairs go to which expert, and the order in which the kernel reads an expert's weights; compiled by numba.

Suffixes: P (token, k) pairs, R pairs sorted by expert, E experts.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
from numba import types
from numpy.typing import NDArray

from moeray.transport.compiled import compiled

LANES = 16
BLOCK = 2 * LANES
"""Output rows in a block of weights."""
Ints = NDArray[np.int32]


def _plan(ids_P: Ints, slot_E: Ints, next_E: Ints, order_R: Ints, row_R: Ints, starts: Ints, slots: Ints) -> int:
    """Sort the pairs by expert, as they come within one.

    Args:
        ids_P: logical expert of every pair, -1 where it belongs to another group.
        slot_E: where each expert's matrices lie, -1 where they are not held.
        next_E: scratch.
        order_R, row_R: written: the pair, and its row in the result.
        starts, slots: written: of the i-th expert that has pairs, the first place in order_R and its slot. The end
            follows the last start.
    Returns:
        number of experts that have pairs, or -1 - pair for a pair whose expert is not held.
    """
    next_E[:] = 0
    for pair in range(len(ids_P)):
        expert = ids_P[pair]
        if expert >= 0:
            if expert >= len(slot_E) or slot_E[expert] < 0:
                return -1 - pair
            next_E[expert] += 1
    active = begin = 0
    for expert in range(len(slot_E)):
        if next_E[expert] > 0:
            starts[active], slots[active] = begin, slot_E[expert]
            begin += next_E[expert]
            next_E[expert] = starts[active]
            active += 1
    starts[active] = begin
    row = 0
    for pair in range(len(ids_P)):
        expert = ids_P[pair]
        if expert >= 0:
            order_R[next_E[expert]], row_R[next_E[expert]] = pair, row
            next_E[expert] += 1
            row += 1
    return active


def _pack(source: Any, low: int, high: int, num_rows: Any, step: int, lane: int, half: int, packed: Any) -> None:
    """Fill blocks: block j has the 16 rows from `low + j * step` on, and beside them those from `high + j * step` on.

    Args:
        source: [rows, depth], integers as wide as an element.
        num_rows: rows from `low` on and from `high` on; a block's rows beyond are zero.
        lane, half: places from one row of a block to the next, and from its first 16 rows to the others.
        packed: written: [blocks, depth * 32].
    """
    depth = source.shape[1]
    for block in range(len(packed)):
        for begin in range(0, depth, 64):  # so many that their lines stay in the core's own cache
            for row in range(BLOCK):
                second, r = divmod(row, LANES)
                in_run, at = block * step + r, r * lane + second * half
                first = high if second else low
                for k in range(begin, min(begin + 64, depth)):
                    packed[block, k * BLOCK + at] = source[first + in_run, k] if in_run < num_rows[second] else 0


@cache
def plan() -> Callable[..., int]:
    """See `_plan`."""
    return compiled(_plan, (types.int32[::1],) * 7)


@cache
def pack(*, bf16: bool) -> Callable[..., None]:
    """See `_pack`."""
    i64, rows = types.int64, (types.int16 if bf16 else types.int32)[:, ::1]
    return compiled(_pack, (rows, i64, i64, types.UniTuple(i64, 2), i64, i64, i64, rows))
