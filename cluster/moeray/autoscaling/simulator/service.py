"""How fast simulated shards and groups are: linear in what they have to do."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Service:
    """The defaults are DeepSeek-V4-Flash on H200 as `moeray plan` predicts it (benchmarks/autoscaling.py finds them).

    Attributes:
        places, kv_tokens: requests, and tokens of them, that a shard has room for.
        own_s, own_token_s: of one decode step at a shard, without experts: fixed, and per request.
        expert_s, expert_token_s: of a step at a group: fixed, and per token of all shards that the group gets.
        prompt_token_s: of a shard's time, per prompt token that is computed.
        prompt_share: of a shard's time, at most, goes to prompts while others decode.
        join_s: from the decision to a process that serves.
    """

    places: int = 128
    kv_tokens: int = 1_000_000
    own_s: float = 0.006
    own_token_s: float = 0.00003
    expert_s: float = 0.003
    expert_token_s: float = 0.00004
    prompt_token_s: float = 0.00002
    prompt_share: float = 0.7
    join_s: float = 90.0

    def step_s(self, running: float, shards: int, groups: int) -> tuple[float, float, float]:
        """One decode step with so many requests in all shards.

        Returns:
            Its seconds, the experts' share of it, and how busy groups are.
        """
        each = running / max(1, shards)
        own = self.own_s + self.own_token_s * each
        if not groups:
            return own, 0.0, 0.0
        call = self.expert_s + self.expert_token_s * each * max(1, shards) / groups
        total = max(own + call, call)
        return total, call / total, min(1.0, call / total if running else 0.0)
