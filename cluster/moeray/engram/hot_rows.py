"""A bounded number of one table's rows, in this process: those that were asked for again and lately."""

from __future__ import annotations

import threading

import numpy as np

from moeray.engram.hot_rows_kernel import EMPTY, WAYS, admit_kernel, find_kernel
from moeray.engram.rows import Bytes, IntArray


class HotRows:
    """See module docstring. Thread-safe. `scale_bytes` may be 0.

    Args:
        num_bytes: for rows with their scales and what finds them; at least one set of WAYS rows is kept.
    """

    def __init__(self, value_bytes: int, scale_bytes: int, num_bytes: int) -> None:
        of_a_set = WAYS * (value_bytes + scale_bytes + 9) + 8
        num_sets = max(1, num_bytes // of_a_set)
        self.num_slots = num_sets * WAYS
        self._find, self._admit = find_kernel(), admit_kernel()
        self._values: Bytes = np.empty((self.num_slots, value_bytes), dtype=np.uint8)
        self._scales: Bytes = np.empty((self.num_slots, scale_bytes), dtype=np.uint8)
        self._rows_SW = np.full((num_sets, WAYS), EMPTY, dtype=np.int64)
        self._used_SW = np.zeros((num_sets, WAYS), dtype=np.uint8)
        self._hands_S = np.zeros(num_sets, dtype=np.int64)
        self._lock = threading.Lock()

    def bring(self, rows_N: IntArray, values: Bytes, scales: Bytes) -> IntArray:
        """Copy the rows that are here to their places.

        Args:
            values, scales: uint8 [N, ...]; written where the row is here.
        Returns:
            indices (of N) of those that are not.
        """
        slots_N = np.empty(len(rows_N), dtype=np.int64)
        with self._lock:
            if not self._find(rows_N, self._rows_SW, self._used_SW, slots_N):
                return np.arange(len(rows_N))
            here = np.flatnonzero(slots_N >= 0)
            values[here] = self._values[slots_N[here]]
            scales[here] = self._scales[slots_N[here]]
        return np.flatnonzero(slots_N < 0)

    def missing(self, rows_N: IntArray) -> IntArray:
        """Those of the rows that are not here."""
        slots_N = np.empty(len(rows_N), dtype=np.int64)
        with self._lock:
            self._find(rows_N, self._rows_SW, self._used_SW, slots_N)
        return rows_N[slots_N < 0]

    def keep(self, rows_N: IntArray, values: Bytes, scales: Bytes) -> None:
        """Take copies; others go if need be."""
        slots_N = np.empty(len(rows_N), dtype=np.int64)
        with self._lock:
            self._admit(rows_N, self._rows_SW, self._used_SW, self._hands_S, slots_N)
            # Where two rows got one slot, the later one has it in both arrays, as it has in `_rows_SW`.
            self._values[slots_N] = values
            self._scales[slots_N] = scales
