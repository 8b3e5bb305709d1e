"""When a store that fails is left alone, and when it is tried again (a state machine without a clock of its own)."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable
from time import monotonic

FAILURES = 3
"""In a row, of one kind; then the store is left alone."""
FIRST_REST_S, LONGEST_REST_S = 1.0, 60.0


class Breaker:
    """Closed: the store is used. Open: it is not. After a rest one call is let through: it decides.

    Each failure of that one call doubles the rest, up to LONGEST_REST_S. What a call does is its kind: a store that
    says what it has, and never hands it over, is not a good one. Once calls of another kind have let such a store back,
    one more failure of the kind that failed is enough, for twice the rest. Thread-safe.
    """

    def __init__(self, clock: Callable[[], float] = monotonic) -> None:
        self._clock, self._lock = clock, threading.Lock()
        self._failures: Counter[str] = Counter()
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

    def succeeded(self, kind: str = "") -> None:
        with self._lock:
            del self._failures[kind]
            if not self._failures:
                self._rest_s = FIRST_REST_S
            elif self._open_until is not None:
                self._failures = Counter({other: min(num, FAILURES - 1) for other, num in self._failures.items()})
                self._rest_s = min(LONGEST_REST_S, 2 * self._rest_s)
            self._open_until, self._is_tried = None, False

    def failed(self, reason: str, kind: str = "") -> bool:
        """Whether this opened it. While it is open, what began before it opened says nothing new."""
        with self._lock:
            self._failures[kind] += 1
            self._reason = reason
            if self._open_until is None:
                if self._failures[kind] < FAILURES:
                    return False
                self._open_until = self._clock() + self._rest_s
                return True
            if self._is_tried:
                self._is_tried, self._rest_s = False, min(LONGEST_REST_S, 2 * self._rest_s)
                self._open_until = self._clock() + self._rest_s
            return False
