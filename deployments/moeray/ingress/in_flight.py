"""What the ingress knows of each request in flight: enough to go on with it on another shard."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING

from moeray.vllm_hooks.continued_requests import continue_after
from moeray.vllm_hooks.engine_core import EndsShards, ShardLost

if TYPE_CHECKING:
    from vllm.v1.engine import EngineCoreOutput, EngineCoreRequest

    from moeray.vllm_hooks.admission import Place

MAX_DEATHS = 3
"""So many shards in a row may die while they run a request and before it gets a token from them. Then it fails: it is
likely what ends them, and must not go round for ever. Two can be chance: they were killed together."""

MAX_ATTEMPTS = 20
"""How often one request is sent at most without a token, whatever became of the shards."""
WHOLE = 0.9
"""Of `experts.wait_s`: a shard says twice a second how long it has waited."""


class Loss(Enum):
    """How a shard came to run a request no more."""

    DIED = "it died while it ran it"
    GONE = "it does not answer, or another has taken its place"
    LEFT = "it lives, and has refused it or handed it over"


@dataclass(slots=True)
class InFlight:
    """One request between its start and its last token.

    Attributes:
        request: as vLLM's front made it: rendered prompt (token ids) and sampling parameters.
        place: its share of what there is; None only for a request that nobody admitted.
        shard: name of the shard that runs it now; "" while it waits for one.
        progress_at: when it was admitted or last gave an output, in the loop's time.
        token_ids: every token already passed on to the front, in order.
        attempts: how often it was sent to a shard.
        deaths: name and end of each shard in a row that died with it and had not given it a token.
    """

    request: EngineCoreRequest
    progress_at: float
    place: Place | None = None
    shard: str = ""
    token_ids: list[int] = field(default_factory=list)
    attempts: int = 0
    deaths: list[str] = field(default_factory=list)
    _has_token: bool = False
    _in_vain: int = 0

    @property
    def request_id(self) -> str:
        """What the front calls it."""
        return self.request.request_id

    @property
    def wire_id(self) -> str:
        """What the shard calls it: another name for each attempt, so that nothing late is taken for its successor's."""
        return self.request_id if self.attempts <= 1 else f"{self.request_id}+{self.attempts - 1}"

    @property
    def is_suspect(self) -> bool:
        """One more death, and it fails: it must not take others along."""
        return len(self.deaths) == MAX_DEATHS - 1

    def start_on(self, shard: str) -> EngineCoreRequest:
        """Another attempt; returns what this shard is sent."""
        self.shard, self._has_token = shard, False
        self.attempts += 1
        self._in_vain += 1
        return continue_after(self.request, self.wire_id, self.token_ids)

    def record(self, output: EngineCoreOutput, now: float) -> None:
        self.progress_at = now
        self.token_ids.extend(output.new_token_ids)
        if output.new_token_ids:
            self._has_token = True
            self._in_vain = 0
            self.deaths.clear()

    def leave(self, loss: Loss, why: str) -> None:
        """Its shard does not run it any more."""
        if loss is Loss.DIED and not self._has_token:
            self.deaths.append(f"{self.shard}: {why}")
        self.shard = ""

    def why_not_again(
        self, shard: str, loss: Loss, why: str, *, stalled_s: float, stall_s: float
    ) -> EndsShards | ShardLost | None:
        """What it fails with instead of going on elsewhere, after `leave`; None if it may go on.

        Args:
            stalled_s: how long it had no token, and its shard's engine waited for experts.
            stall_s: `experts.wait_s`; after about as long it does not outlive the shard: the next one would only wait
                as long again.
        """
        if len(self.deaths) >= MAX_DEATHS:
            return EndsShards(self.deaths)
        if self._in_vain >= MAX_ATTEMPTS:
            return ShardLost(shard, f"{why}, as were {MAX_ATTEMPTS - 1} before it")
        if loss is not Loss.LEFT and stalled_s >= WHOLE * stall_s:
            waited = (
                f"this request waited {stalled_s:.0f} s for experts that no group has, experts.wait_s is {stall_s:g}"
            )
            return ShardLost(shard, f"{why}; {waited}")
        return None
