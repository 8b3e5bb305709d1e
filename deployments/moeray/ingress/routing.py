"""Which shard a request goes to: the longest cached prefix, less what the shard's load costs. Pure; no clock, no I/O.

Everything is in tokens: a cached token is one that need not be computed, and a request that a shard already has delays
the next one about as much as computing REQUEST_TOKENS would. A token that the shard can fetch from its node's memory or
from the pool of all nodes is worth the share of its computing that fetching saves.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

REQUEST_TOKENS = 256
"""What one more request on a shard is worth, in prompt tokens: a prefix this much longer makes up for it."""
SESSION_TOKENS = 2 * REQUEST_TOKENS
"""What it is worth to stay where the session's last request ran, whose blocks may not have been told yet."""
NODE_WORTH = 0.9
"""Of a token in the memory of the shard's node, beside one on its device."""
POOL_WORTH = 0.7
"""Of a token that any shard can fetch from Redis."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """A shard that may take the request: ready, neither draining nor recovering.

    Attributes:
        shard: its name.
        cached_tokens: of this request's prompt, from the start, that the shard's KV cache holds.
        num_requests: what it has, from all ingresses.
        num_served: what this ingress ever sent there; decides between equals, so that they take turns.
        has_session: whether the session's last request ran there.
        node_tokens, pool_tokens: of the prompt, from the start, that it could fetch from its node and from the pool.
    """

    shard: str
    cached_tokens: int
    num_requests: int
    num_served: int
    has_session: bool = False
    node_tokens: int = 0
    pool_tokens: int = 0

    @property
    def worth_tokens(self) -> float:
        near = max(self.cached_tokens, self.node_tokens)
        worth = self.cached_tokens + NODE_WORTH * (near - self.cached_tokens)
        worth += POOL_WORTH * (max(near, self.pool_tokens) - near)
        return worth + (SESSION_TOKENS if self.has_session else 0) - REQUEST_TOKENS * self.num_requests


def choose(candidates: Iterable[Candidate]) -> str:
    """The shard of the best candidate; of equals the least loaded, then the least used, then the first by name.

    Raises:
        ValueError: there is no candidate.
    """
    best = min(candidates, key=lambda each: (-each.worth_tokens, each.num_requests, each.num_served, each.shard))
    return best.shard
