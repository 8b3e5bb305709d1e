"""How much came in the last 60 s, in bounded memory, and never too little.

Time is cut into buckets of 0.1 s. A bucket counts until its whole content is 60 s old, so no 60 s, wherever they begin,
see more than the limit; a place becomes free up to 0.1 s after it could. Source: docs/adr/0010. The same arithmetic is
in lua/window.lua.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

WINDOW_US = 60_000_000
BUCKET_US = 100_000
NUM_BUCKETS = WINDOW_US // BUCKET_US


@dataclass(slots=True)
class Bucket:
    """Attributes: index: its beginning, in buckets since the clock's zero."""

    index: int
    requests: int
    tokens: int


class SlidingWindow:
    """See module docstring. Times are microseconds of one clock; if it is set back, later buckets become now."""

    def __init__(self) -> None:
        self._buckets: deque[Bucket] = deque()
        self.requests = 0
        self.tokens = 0

    def forget(self, now_us: int) -> None:
        """Drop what is too old; call it before anything else at a time."""
        now = now_us // BUCKET_US
        while self._buckets and self._buckets[0].index < now - NUM_BUCKETS:
            gone = self._buckets.popleft()
            self.requests -= gone.requests
            self.tokens -= gone.tokens
        if self._buckets and self._buckets[-1].index > now:
            late = Bucket(now, 0, 0)
            while self._buckets and self._buckets[-1].index >= now:
                each = self._buckets.pop()
                late.requests += each.requests
                late.tokens += each.tokens
            self._buckets.append(late)

    def add(self, now_us: int, requests: int, tokens: int) -> int:
        """Count something now; the bucket's index, for `change`."""
        index = now_us // BUCKET_US
        if not self._buckets or self._buckets[-1].index != index:
            self._buckets.append(Bucket(index, 0, 0))
        self._change(self._buckets[-1], requests, tokens)
        return index

    def change(self, index: int, requests: int, tokens: int) -> None:
        """Correct what was counted in a bucket; nothing if that is forgotten."""
        for bucket in reversed(self._buckets):
            if bucket.index <= index:
                if bucket.index == index:
                    self._change(bucket, requests, tokens)
                return

    def free_in_us(self, now_us: int, *, requests: int = 0, tokens: int = 0) -> int:
        """When so much of what is counted will be forgotten, if nothing else comes; it must be there."""
        for bucket in self._buckets:
            requests -= bucket.requests
            tokens -= bucket.tokens
            if requests <= 0 and tokens <= 0:
                return (bucket.index + NUM_BUCKETS + 1) * BUCKET_US - now_us
        return WINDOW_US

    def reset_us(self, now_us: int) -> int:
        """When all of it will be forgotten."""
        return (self._buckets[-1].index + NUM_BUCKETS + 1) * BUCKET_US - now_us if self._buckets else 0

    def _change(self, bucket: Bucket, requests: int, tokens: int) -> None:
        bucket.requests += requests
        bucket.tokens += tokens
        self.requests += requests
        self.tokens += tokens
