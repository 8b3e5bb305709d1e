"""One process of the cluster, as the controller knows it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any


class Role(StrEnum):
    INGRESS = "ingress"
    ATTENTION_SHARD = "attention_shard"
    EXPERT_GROUP = "expert_group"
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
        index: position within its role, lowest free at joining; an expert group's is its group number.
        address: host:port where peers reach it; empty until it is ready.
        reason: why it was lost; empty otherwise.
        generation: of an expert group, the newest one it is part of; 0 before its first.
        identity: of the model it has loaded (see agreement.py); None before.
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

    @property
    def name(self) -> str:
        """For messages: role, number and where to look."""
        return f"{self.role.replace('_', ' ')} {self.index} (node {self.node[:8]}, pid {self.pid})"

    @property
    def is_alive(self) -> bool:
        return self.state is not MemberState.LOST
