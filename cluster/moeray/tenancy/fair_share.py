"""Start-time fair queueing over tenants by weight: whose request goes first inside a priority class.

A request's tag is where its tenant stands in virtual time, in tokens per weight. Whoever has had more than its share
stands further on and waits; whoever comes back stands where the work in hand is: no credit for idle time. Lower tags go
first, so a tag fits vLLM's `priority`. Source: Goyal, Vin, Cheng, "Start-time fair queuing" (1996): while two tenants
wait, what they have been served, per weight, differs by at most one largest request of each.
"""

from __future__ import annotations

from math import ceil

TAG_BITS = 48
"""Below the class in `engine_priority`: nine years of a million tokens a second."""


class FairClock:
    """Virtual time of one queue. Pure: it reads no clock, time moves on when requests begin."""

    def __init__(self) -> None:
        self._now = 0
        self._ends: dict[str, int] = {}
        self._last: dict[str, int] = {}

    def tag(self, tenant: str, num_tokens: int, weight: float = 1.0) -> int:
        """Place a request behind what its tenant has asked for before.

        Args:
            num_tokens: what it may take.
        Returns:
            its tag; never lower than the tenant's one before.
        """
        start = max(self._now, self._ends.get(tenant, 0))
        self._ends[tenant] = start + max(1, ceil(num_tokens / weight))
        self._last[tenant] = start
        return start

    def started(self, tag: int) -> None:
        """A request with this tag is being served, here or (as shards report it) from another ingress."""
        if tag <= self._now:
            return
        self._now = tag
        for tenant in [name for name, end in self._ends.items() if end <= tag]:
            del self._ends[tenant], self._last[tenant]  # they stand where everybody stands

    def settle(self, tenant: str, num_tokens: int, used: int, weight: float = 1.0) -> None:
        """A request took `used` tokens instead of `num_tokens`: its tenant's next ones need not wait for the rest."""
        end = self._ends.get(tenant)
        if end is not None:
            difference = max(1, ceil(used / weight)) - max(1, ceil(num_tokens / weight))
            self._ends[tenant] = max(self._last[tenant], end + difference)


def engine_priority(priority_class: int, tag: int) -> int:
    """For vLLM's `priority`: classes first, tags inside them."""
    return (priority_class << TAG_BITS) + min(tag, (1 << TAG_BITS) - 1)


def split_priority(priority: int) -> tuple[int, int]:
    """(class, tag) of an `engine_priority`."""
    return priority >> TAG_BITS, priority & ((1 << TAG_BITS) - 1)
