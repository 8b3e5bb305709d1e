"""How long a layer call waits for a group whose experts others hold, too.

A hung group gives no sign; all that tells it from a busy one is a late answer. How late is late depends on the
model, the batch and the machine, so it is learnt from the calls before: what a row cost at most, of late.
"""

from __future__ import annotations

OTHER_ROWS = 64
"""What a call costs beside its rows (waking up, other shards' calls before it), in rows."""
FORGET = 0.99
"""Per call: a slow one is remembered for a few hundred."""
TIMES = 4


class Patience:
    """Of one transport; used by its thread."""

    def __init__(self, patience_s: float, timeout_s: float, *, replaceable: bool) -> None:
        """Nothing is known yet.

        Args:
            patience_s: beyond TIMES what is expected.
            timeout_s: the longest wait in any case.
            replaceable: every group's experts have copies in others.
        """
        self._patience_s, self._timeout_s = patience_s, timeout_s
        self._replaceable = replaceable
        self._row_s = 0.0

    def limit_s(self, num_rows: int) -> float:
        """For a call of so many (token, expert) rows."""
        if not self._replaceable or not self._row_s:
            return self._timeout_s
        return min(self._timeout_s, self._patience_s + TIMES * self._row_s * (num_rows + OTHER_ROWS))

    def took(self, num_rows: int, seconds: float) -> None:
        """A call was answered."""
        row_s = seconds / (num_rows + OTHER_ROWS)
        faded = FORGET * self._row_s
        self._row_s = row_s if row_s > faded else faded
