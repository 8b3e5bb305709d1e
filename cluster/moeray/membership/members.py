"""One process of the cluster, as the controller knows it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from enum import StrEnum
from typing import Any


class Role(StrEnum):
    INGRESS = "ingress"
    ATTENTION_SHARD = "attention_shard"
    EXPERT_GROUP = "expert_group"
    ENGRAM_SERVER = "engram_server"
    CONTROLLER = "controller"


class MemberState(StrEnum):
    STARTING = "starting"
    READY = "ready"
    DRAINING = "draining"
    LOST = "lost"


@dataclass(frozen=True, slots=True)
class Member:
    """A process that joined.

    Attributes:
        id: unique for the life of the cluster; a restarted process joins under a new one.
        index: number within its role, lowest free at joining; expert groups are ordered by it.
        address: host:port where peers reach it; empty until it is ready.
        reason: why it was lost; empty otherwise.
        generation: the newest one it is part of (an expert group) or has adopted (a shard); 0 before its first.
        identity: of the model it has loaded (see agreement.py); None before.
        given_up: lost, and not taken back although it may still run.
    """

    id: str
    role: Role
    pid: int
    node: str
    index: int
    state: MemberState = MemberState.STARTING
    address: str = ""
    reason: str = ""
    generation: int = 0
    identity: Mapping[str, Any] | None = None
    given_up: bool = False

    @property
    def name(self) -> str:
        """For messages: role, number and where to look."""
        return f"{self.role.replace('_', ' ')} {self.index} (node {self.node[:8]}, pid {self.pid})"

    @property
    def is_alive(self) -> bool:
        return self.state is not MemberState.LOST

    @property
    def serves(self) -> bool:
        """Whether peers reach it: a draining one finishes what it has."""
        return self.state in (MemberState.READY, MemberState.DRAINING) and bool(self.address)

    def to_json(self) -> dict[str, Any]:
        values = {each.name: getattr(self, each.name) for each in fields(self)}
        return {**values, "identity": None if self.identity is None else dict(self.identity)}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Member:
        return cls(**{**data, "role": Role(data["role"]), "state": MemberState(data["state"])})
