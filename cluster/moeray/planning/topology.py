"""Ways to lay a model out over devices."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

KindName = Literal["split", "tensor", "data"]


@dataclass(frozen=True, slots=True)
class Topology:
    """One of them; every process has one device.

    Attributes:
        kind: split: attention shards and expert groups apart; tensor: plain expert parallelism below attention in
            tensor parallel, one engine (`experts.num_groups: 0`); data: the same below attention in data parallel, as
            vLLM and SGLang serve it on many nodes.
        attention: shards, or ranks of plain expert parallelism.
        groups: expert groups; 0 of plain expert parallelism.
        redundant: copies of experts, of all groups together, per layer.
    """

    kind: KindName
    attention: int
    groups: int = 0
    redundant: int = 0

    @property
    def devices(self) -> int:
        return self.attention + self.groups

    @property
    def tensor(self) -> int:
        """Ranks that divide one layer's attention."""
        return self.attention if self.kind == "tensor" else 1

    @property
    def expert_ranks(self) -> int:
        """Devices that hold routed experts."""
        return self.groups if self.kind == "split" else self.attention

    @property
    def name(self) -> str:
        """As tables show it."""
        if self.kind == "split":
            return f"{self.attention}A x {self.groups}E"
        if self.attention == 1:
            return "unsplit"
        return f"EP{self.attention}, attention in {self.kind} parallel"
