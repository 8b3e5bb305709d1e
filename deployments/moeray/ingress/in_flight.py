"""What the ingress knows of each request in flight: enough to run it again elsewhere."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vllm.v1.engine import EngineCoreOutput, EngineCoreRequest


@dataclass(slots=True)
class InFlight:
    """One request between its start and its last token.

    Attributes:
        request: as vLLM's front made it: rendered prompt (token ids) and sampling parameters.
        shard: name of the shard that runs it now.
        token_ids: every token already passed on to the front, in order.
    """

    request: EngineCoreRequest
    shard: str
    token_ids: list[int] = field(default_factory=list)

    def record(self, output: EngineCoreOutput) -> None:
        self.token_ids.extend(output.new_token_ids)
