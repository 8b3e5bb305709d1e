"""How much of the time experts are computed."""

from __future__ import annotations

from collections.abc import Callable
from time import perf_counter
from typing import Any


class BusyCompute:
    """A computation and the time that it takes.

    Attributes:
        calls: that have ended.
        spent_s: by them; of calls side by side each counts.
    """

    def __init__(self, compute: Callable[..., Any]) -> None:
        self._compute, self.calls, self.spent_s = compute, 0, 0.0

    def __call__(self, *arguments: Any) -> Any:
        began = perf_counter()
        try:
            return self._compute(*arguments)
        finally:
            self.spent_s += perf_counter() - began
            self.calls += 1
