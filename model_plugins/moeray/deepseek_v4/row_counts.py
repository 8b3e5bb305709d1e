"""How many rows each expert has computed: the load by which copies are placed."""

from __future__ import annotations

import threading

import numpy as np
from numpy.typing import NDArray


class RowCounts:
    """Rows computed per layer and expert; thread-safe."""

    def __init__(self, num_layers: int, num_experts: int) -> None:
        self._rows_LE = np.zeros((num_layers, num_experts), dtype=np.int64)
        self._lock = threading.Lock()

    def add(self, layer: int, experts_P: NDArray[np.int32]) -> None:
        """Count one call: the expert of every row it computed."""
        rows_E = np.bincount(experts_P, minlength=self._rows_LE.shape[1])
        with self._lock:
            self._rows_LE[layer] += rows_E

    def rows(self) -> NDArray[np.int64]:
        """[num_layers, num_experts] (a copy)."""
        with self._lock:
            return self._rows_LE.copy()
