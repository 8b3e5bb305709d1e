"""What computing and fetching cost here, learned from what they did cost.

Both are straight lines, fitted by least squares to what was observed; older observations count less and less, and a
machine or a network that has become another is noticed within a few. Nothing is assumed: without observations there is
no prediction.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

FORGET = 0.98
"""Weight of an observation after each later one: about the last fifty count."""
DRIFT = 0.4
"""Share of the last observation in how far the line is off of late."""
OTHER = 3.0
"""A line that is off by so much, of late, was of other times: it begins anew."""
RIDGE = 1e-6
"""Of the mean square of each feature: observations that are all alike still have a solution."""


class Line:
    """seconds = weights x features, with weights of at least zero.

    Args:
        num_features: of each observation.
    """

    def __init__(self, num_features: int) -> None:
        self._moments: npt.NDArray[np.float64] = np.zeros((num_features, num_features))
        self._products: npt.NDArray[np.float64] = np.zeros(num_features)
        self._weights: npt.NDArray[np.float64] = np.zeros(num_features)
        self._drift = 1.0
        self.num_observed = 0

    def observe(self, features: Sequence[float], seconds: float) -> None:
        """One thing that took so long. Relative errors are what counts: an observation weighs as its inverse square."""
        seconds = max(seconds, 1e-9)
        x = np.asarray(features, dtype=np.float64) / seconds
        self._add(x)
        if expected := float(np.dot(self._weights, x)):  # of what was observed, even after it has been learned from
            self._drift = self._drift ** (1 - DRIFT) * expected**-DRIFT
        if not 1 / OTHER < self._drift < OTHER:
            self._moments[:], self._products[:], self._drift = 0.0, 0.0, 1.0
            self._add(x)
        self.num_observed += 1

    def _add(self, x: npt.NDArray[np.float64]) -> None:
        self._moments = FORGET * self._moments + np.outer(x, x)
        self._products = FORGET * self._products + x
        self._weights = _solved(self._moments, self._products)

    def predict(self, features: Sequence[float]) -> float | None:
        """Seconds; None before the first observation."""
        if not self.num_observed:
            return None
        return self._drift * float(np.dot(self._weights, np.asarray(features, dtype=np.float64)))


def _solved(moments: npt.NDArray[np.float64], products: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Least squares without negative weights: a feature that would get one is left out, the worst first."""
    kept = np.flatnonzero(np.diag(moments) > 0)
    weights = np.zeros(len(products))
    while len(kept):
        part = moments[np.ix_(kept, kept)]
        part = part + RIDGE * np.diag(np.diag(part))
        found = np.linalg.solve(part, products[kept])
        if (found >= 0).all():
            weights[kept] = found
            break
        kept = np.delete(kept, int(np.argmin(found)))
    return weights


class PrefillCost:
    """What a shard's steps cost: a part per step, one per token, one per token and token before it."""

    def __init__(self) -> None:
        self._line = Line(3)

    @property
    def num_observed(self) -> int:
        return self._line.num_observed

    def observe(self, spans: Sequence[tuple[int, int]], seconds: float) -> None:
        """A step that computed these spans (first token, one past the last) of its requests."""
        tokens = sum(end - start for start, end in spans)
        pairs = sum(_pairs(start, end) for start, end in spans)
        self._line.observe((1.0, tokens, pairs), seconds)

    def predict(self, start: int, end: int, step_tokens: int) -> float | None:
        """Seconds to compute tokens `start` to `end` alone, `step_tokens` a step; None before the first observation."""
        num_steps = -(-(end - start) // step_tokens)
        return self._line.predict((num_steps, end - start, _pairs(start, end)))


class TransferCost:
    """What bringing blocks from a store costs: a part per transfer, one per byte."""

    def __init__(self) -> None:
        self._line = Line(2)

    @property
    def num_observed(self) -> int:
        return self._line.num_observed

    def observe(self, num_bytes: int, seconds: float) -> None:
        self._line.observe((1.0, num_bytes), seconds)

    def predict(self, num_bytes: int) -> float | None:
        """Seconds; None before the first observation."""
        return self._line.predict((1.0, num_bytes))


def _pairs(start: int, end: int) -> float:
    """Sum over the span's tokens of the tokens before each."""
    return (end - start) * (start + end - 1) / 2
