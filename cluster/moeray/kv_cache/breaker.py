"""When a store that fails is left alone, and when it is tried again (a state machine without a clock of its own)."""

from __future__ import annotations

import threading
from collections.abc import Callable
from time import monotonic

FAILURES = 3
"""In a row; then the store is left alone."""
FIRST_REST_S, LONGEST_REST_S = 1.0, 60.0


class Breaker:
    """Closed: the store is used. Open: it is not. After a rest one call is let through: it decides.

    Each failure of that one call doubles the rest, up to LONGEST_REST_S. Thread-safe.
    """

    def __init__(self, clock: Callable[[], float] = monotonic) -> None:
        self._clock, self._lock = clock, threading.Lock()
        self._failures = 0
        self._rest_s = FIRST_REST_S
        self._is_tried = False
        self._open_until: float | None = None
        self._reason = ""

    @property
    def is_closed(self) -> bool:
        return self._open_until is None

    @property
    def reason(self) -> str:
        """Why it is open; empty while it is closed."""
        return self._reason if self._open_until is not None else ""

    def allows(self) -> bool:
        """Whether the store may be called now. True once per rest while it is open: that call must end in a verdict."""
        with self._lock:
            if self._open_until is None:
                return True
            if self._clock() < self._open_until:
                return False
            self._open_until, self._is_tried = self._clock() + self._rest_s, True
            return True

    def succeeded(self) -> None:
        with self._lock:
            self._failures, self._rest_s, self._open_until, self._is_tried = 0, FIRST_REST_S, None, False

    def failed(self, reason: str) -> bool:
        """Whether this opened it. While it is open, what began before it opened says nothing new."""
        with self._lock:
            self._failures += 1
            self._reason = reason
            if self._open_until is None:
                if self._failures < FAILURES:
                    return False
                self._open_until = self._clock() + self._rest_s
                return True
            if self._is_tried:
                self._is_tried, self._rest_s = False, min(LONGEST_REST_S, 2 * self._rest_s)
                self._open_until = self._clock() + self._rest_s
            return False
