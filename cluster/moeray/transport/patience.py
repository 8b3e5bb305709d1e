"""How long a shard waits for a group whose experts others hold, too.

A hung group gives no sign, and a slow one answers: what tells either from a busy one is how long it is waited for when
all others have answered. Two bounds follow from that, both in `patience_s`:

* one layer call waits so much longer than expected. What to expect depends on the model, the batch and the machine, so
  it is learnt from the calls before: what a row cost at most, of late, in the groups that were not waited for last;
* all layer calls together may cost so much for one group, beyond HALF of the time that passes. A group that is a
  hundred times slower than the others of the same call is one that is waited for nearly all the time: it is too slow
  after about twice `patience_s`. One that now and then is late by milliseconds never is.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

OTHER_ROWS = 64
"""What a call costs beside its rows (waking up, other shards' calls before it), in rows."""
FORGET = 0.99
"""Per call: a slow one is remembered for a few hundred."""
TIMES = 4
"""What other groups took, so many times, is no sign of anything."""
HALF = 0.5


class Answered(NamedTuple):
    """How one layer call was answered.

    Attributes:
        rows: (token, expert) rows of each group.
        seconds: from dispatch to the last answer.
        last: index of the group that was waited for when all others had answered; -1 if none was, or nobody can tell.
        alone_s: how long.
    """

    rows: Sequence[int]
    seconds: float
    last: int
    alone_s: float


class Patience:
    """Of one transport; used by its thread."""

    def __init__(self, patience_s: float, timeout_s: float, *, replaceable: bool) -> None:
        """Nothing is known yet.

        Args:
            patience_s: see module docstring.
            timeout_s: the longest wait in any case.
            replaceable: every group's experts have copies in others; otherwise there is nothing to do but to wait.
        """
        self._patience_s, self._timeout_s = patience_s, timeout_s
        self._replaceable = replaceable
        self._row_s = 0.0
        self._cost_s: dict[int, tuple[float, float]] = {}

    def limit_s(self, num_rows: int) -> float:
        """For a call of so many rows."""
        if not self._replaceable or not self._row_s:
            return self._timeout_s
        return min(self._timeout_s, self._patience_s + TIMES * self._row_s * (num_rows + OTHER_ROWS))

    def is_over(self, call: Answered, now: float) -> bool:
        """Learn from an answered call; whether its last group has become too slow.

        Args:
            now: in seconds, of any clock that does not jump.
        """
        others_s = max(0.0, call.seconds - call.alone_s)
        row_s = others_s / (sum(call.rows) + OTHER_ROWS)
        self._row_s = max(row_s, FORGET * self._row_s)
        if call.last < 0 or not self._replaceable:
            return False
        rows = call.rows[call.last] + OTHER_ROWS
        other_rows = max(num for group, num in enumerate(call.rows) if group != call.last) + OTHER_ROWS
        excess_s = call.alone_s - TIMES * others_s * rows / other_rows
        cost_s, since = self._cost_s.get(call.last, (0.0, now))
        cost_s = max(0.0, cost_s - HALF * (now - since)) + max(0.0, excess_s)
        self._cost_s[call.last] = cost_s, now
        return cost_s > self._patience_s
