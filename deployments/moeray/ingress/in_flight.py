"""What the ingress knows of each request in flight: enough to go on with it on another shard."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from moeray.vllm_hooks.continued_requests import continue_after

if TYPE_CHECKING:
    from vllm.v1.engine import EngineCoreOutput, EngineCoreRequest

MAX_DEATHS = 3
"""So many shards in a row may die while they run a request and before it gets a token from them. Then it fails: it is
likely what ends them, and must not go round for ever. Two can be chance: they were killed together."""

MAX_ATTEMPTS = 20
"""How often one request is sent at most, whatever became of the shards."""


@dataclass(slots=True)
class InFlight:
    """One request between its start and its last token.

    Attributes:
        request: as vLLM's front made it: rendered prompt (token ids) and sampling parameters.
        shard: name of the shard that runs it now; "" while it waits for one.
        token_ids: every token already passed on to the front, in order.
        attempts: how often it was sent to a shard.
        deaths: name and end of each shard in a row that died with it and had not given it a token.
    """

    request: EngineCoreRequest
    shard: str = ""
    token_ids: list[int] = field(default_factory=list)
    attempts: int = 0
    deaths: list[str] = field(default_factory=list)
    _has_token: bool = False

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
        return continue_after(self.request, self.wire_id, self.token_ids)

    def record(self, output: EngineCoreOutput) -> None:
        self.token_ids.extend(output.new_token_ids)
        if output.new_token_ids:
            self._has_token = True
            self.deaths.clear()

    def leave(self, end: str | None) -> None:
        """Its shard does not run it any more.

        Args:
            end: how the shard died; None if it did not.
        """
        if end is not None and not self._has_token:
            self.deaths.append(f"{self.shard}: {end}")
        self.shard = ""
