"""The cluster's own numbers, as its controller knows them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from moeray.controller.redundancy import describe_generations
from moeray.membership import Membership, Role
from moeray.telemetry import Sample
from moeray.telemetry import families as f


@dataclass(slots=True)
class ControllerMetrics:
    """What happened while this controller lives."""

    losses: Counter[str] = field(default_factory=Counter)
    generations: int = 0
    wanted: dict[str, int] = field(default_factory=dict)
    scaling: Counter[tuple[str, str, str]] = field(default_factory=Counter)

    def applied(self, before: Membership, after: Membership) -> None:
        """The membership changed."""
        self.generations += after.current.number > before.current.number

    def lost(self, role: str) -> None:
        self.losses[role] += 1

    def scaled(self, reasons: Mapping[str, Mapping[str, Any]]) -> None:
        """Autoscaling wants so many of each pool: pool -> count, reason and its cause."""
        for pool, each in reasons.items():
            before, count = self.wanted.get(pool), int(each["count"])
            self.wanted[pool] = count
            if before is not None and before != count:
                direction = "up" if count > before else "down"
                self.scaling[pool, direction, each.get("cause") or "operator"] += 1

    def samples(self, state: Membership) -> Iterator[Sample]:
        """Of this moment; `state` is the membership's, which nobody changes."""
        found = describe_generations(state)
        yield Sample(f.GENERATION, (), state.current.number)
        yield Sample(f.COMPLETE, (), float(state.is_complete))
        yield Sample(f.COVERED, (), float(state.is_covered))
        yield Sample(f.MISMATCHES, (), len(state.mismatches()))
        yield Sample(f.GENERATIONS, (), self.generations)
        if copies := found["copies"]:
            yield Sample(f.COPIES, ("placed",), copies["fewest"])
            yield Sample(f.COPIES, ("living",), copies["fewest_living"])
            yield Sample(f.EXPERTS_LOST, (), copies["experts_lost"])
        for (role, member_state), count in Counter((m.role, m.state) for m in state.members.values()).items():
            yield Sample(f.MEMBERS, (role, member_state), count)
        for role in Role:
            if role is not Role.CONTROLLER:
                yield Sample(f.LOSSES, (role,), self.losses[role])
        if state.target:
            yield Sample(f.WANTED, ("experts",), state.target)
        for pool, count in self.wanted.items():
            if pool != "experts":
                yield Sample(f.WANTED, (pool,), count)
        for labels, count in self.scaling.items():
            yield Sample(f.SCALING, labels, count)
