"""What the clients of an ingress ask for, and how long they wait: of the last minute, at a fixed cost per token."""

from __future__ import annotations

import math
from collections.abc import Callable
from time import monotonic

WINDOW_S = 60.0
"""Latencies of more than this ago are forgotten; those of at least half of it are remembered."""
RATE_WINDOW_S = 20.0
"""The same of rates, which are wanted sooner."""
SILENT_S = 10.0
"""After so long without any, what was before says nothing of now."""
STEP = 1.05
"""Times are known to within 5 %."""
SHORTEST_S = 1e-4
ANSWER_WEIGHT = 0.05
"""Of the latest answer's length in what the next ones are taken to have."""


class RecentTimes:
    """Times of the last `window_s`, counted by size, in two halves; the older one is dropped when it is too old."""

    def __init__(self, window_s: float = WINDOW_S, clock: Callable[[], float] = monotonic) -> None:
        self._half_s, self._clock = window_s / 2, clock
        self._halves: list[dict[int, int]] = [{}, {}]
        self._since = self._added = clock()

    def add(self, seconds: float, count: int = 1) -> None:
        """`count` times of so many seconds."""
        self._forget()
        self._added = self._clock()
        size = max(0, math.ceil(math.log(max(seconds, SHORTEST_S) / SHORTEST_S) / math.log(STEP)))
        now = self._halves[0]
        now[size] = now.get(size, 0) + count

    def percentile(self, percent: float) -> float | None:
        """The time that `percent` of them do not exceed, rounded up to a step; None if there was none lately."""
        self._forget()
        if self._clock() - self._added > SILENT_S:
            return None
        sizes = sorted({*self._halves[0], *self._halves[1]})
        counts = [sum(half.get(size, 0) for half in self._halves) for size in sizes]
        left = math.ceil(sum(counts) * percent / 100)
        for size, count in zip(sizes, counts, strict=True):
            left -= count
            if left <= 0:
                return SHORTEST_S * STEP**size
        return None

    def clear(self) -> None:
        """As if nothing had been seen."""
        self._halves = [{}, {}]

    def _forget(self) -> None:
        passed = self._clock() - self._since
        if passed >= 2 * self._half_s:
            self._halves = [{}, {}]
        elif passed >= self._half_s:
            self._halves = [{}, self._halves[0]]
        else:
            return
        self._since = self._clock()


class RecentRate:
    """Something per second, over the last `window_s`: as `RecentTimes` forgets."""

    def __init__(self, window_s: float = RATE_WINDOW_S, clock: Callable[[], float] = monotonic) -> None:
        self._half_s, self._clock = window_s / 2, clock
        self._amounts, self._lengths_s = [0.0, 0.0], [0.0, 0.0]
        self._since = clock()

    def add(self, amount: float) -> None:
        self._forget()
        self._amounts[0] += amount

    def per_second(self) -> float:
        """0 until a second has passed."""
        self._forget()
        seconds = self._clock() - self._since + self._lengths_s[1]
        return sum(self._amounts) / seconds if seconds >= 1 else 0.0

    def _forget(self) -> None:
        passed = self._clock() - self._since
        if passed >= 2 * self._half_s:
            self._amounts, self._lengths_s = [0.0, 0.0], [0.0, self._half_s]
        elif passed >= self._half_s:
            self._amounts, self._lengths_s = [0.0, self._amounts[0]], [0.0, passed]
        else:
            return
        self._since = self._clock()


class ServiceLevel:
    """What clients ask for, and how long they wait, as autoscaling wants it. Costs about a microsecond per output."""

    def __init__(self, clock: Callable[[], float] = monotonic) -> None:
        self._first, self._later, self._asked = (
            RecentTimes(clock=clock),
            RecentTimes(clock=clock),
            RecentRate(clock=clock),
        )
        self._answer_tokens = 0.0

    def asked(self, num_prompt: int, num_sequences: int = 1) -> None:
        """A request came, whether it is taken or refused. Its answers will be as long as answers were lately."""
        self._asked.add(num_prompt + num_sequences * self._answer_tokens)

    def answered(self, waited_s: float, num_tokens: int, num_cached: int | None) -> None:
        """Tokens of one answer came.

        Args:
            waited_s: since the ones before, or since the request came.
            num_cached: tokens of the prompt that were not computed, with the first tokens; else None.
        """
        if num_cached is None:
            self._later.add(waited_s / num_tokens, num_tokens)
        else:
            self._first.add(waited_s)
            self._asked.add(-num_cached)

    def ended(self, num_tokens: int) -> None:
        """An answer is complete, with so many tokens."""
        self._answer_tokens += ANSWER_WEIGHT * (num_tokens - self._answer_tokens)

    def changed(self) -> None:
        """There are other shards: how long clients waited before says nothing of them."""
        self._first.clear()
        self._later.clear()

    def report(self) -> dict[str, float]:
        """See `moeray.autoscaler.observing.INGRESS`."""
        found = {"ttft_p95_s": self._first.percentile(95), "tpot_p95_s": self._later.percentile(95)}
        known = {name: value for name, value in found.items() if value is not None}
        return {"tokens_per_s": max(0.0, self._asked.per_second()), **known}
