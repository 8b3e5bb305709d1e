"""The membership state machine: events in, a new immutable state out.

A generation is one agreed set of expert groups. It forms when every group number has a ready group, and a new one
forms whenever that set has changed and is complete again. Between the loss of a group and the next generation the
old number stays, marked incomplete: nothing may be dispatched.

Only members that serve the same model share a generation. A generation of a model that was not served before (the
first one above all) forms when at least one shard has loaded it too and no loaded shard has another one. Once it is in
force its model stands: a group with another one cannot complete the next generation, a shard with another one is left
out and does not hold up the others. `View.mismatches` names who and why.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType

from moeray.membership.agreement import Identity, agree, disagreements
from moeray.membership.members import Member, MemberState, Role

NUM_LOST_REMEMBERED = 8


class MembershipError(ValueError):
    """An event that does not fit the state, e.g. a report from a process that never joined."""


@dataclass(frozen=True, slots=True)
class View:
    """What shards and ingresses need to know, at one version of the state.

    Attributes:
        epoch: which life of the controller this is of; versions of different epochs do not compare.
        version: grows with every event that changed the state.
        generation: 0 until the first one formed.
        is_complete: every expert group of the generation is alive.
        missing: of an incomplete generation, each group that is not there and why.
        group_addresses: [N] in group order, of the current generation.
        shards: ready attention shards, id -> relay address.
        mismatches: id -> how a member's model differs from the others'; such a member takes no part.
    """

    epoch: int
    version: int
    generation: int
    is_complete: bool
    missing: tuple[str, ...]
    group_addresses: tuple[str, ...]
    shards: Mapping[str, str]
    mismatches: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Membership:
    """The whole state. `num_groups` 0 means that experts are not remote: generation 1 forms at once.

    Attributes:
        groups: ids of the generation's groups, in group order.
        served: identity of the generation's model; None before the first, and without remote groups.
    """

    num_groups: int
    epoch: int = 0
    version: int = 0
    generation: int = 0
    groups: tuple[str, ...] = ()
    served: Identity | None = None
    members: Mapping[str, Member] = field(default_factory=lambda: MappingProxyType({}))

    @classmethod
    def start(cls, num_groups: int, *, epoch: int = 0) -> Membership:
        return cls(num_groups=num_groups, epoch=epoch, generation=0 if num_groups else 1)

    def join(
        self, *, id: str, role: Role, pid: int, node: str, index: int | None = None, generation: int = 0
    ) -> Membership:
        """A process starts, or comes back to a controller that was restarted and knows nobody.

        Args:
            index: the number it had; None gives it the lowest free one of its role.
            generation: the newest one it is part of. If all groups come back from the same one, it goes on as it was;
                otherwise the next to form is above it.
        Raises:
            MembershipError: id or number are taken, or the expert groups are all there already.
        """
        if id in self.members and self.members[id].is_alive:
            raise MembershipError(f"{role} {id} has joined already")
        taken = {member.index for member in self.members.values() if member.role is role and member.is_alive}
        if index is None:
            index = next(number for number in range(len(taken) + 1) if number not in taken)
        if index in taken:
            raise MembershipError(f"{role} {id} cannot take number {index} back: another process has it")
        if role is Role.EXPERT_GROUP and index >= self.num_groups:
            raise MembershipError(f"expert group {id} is one too many: all {self.num_groups} group numbers are taken")
        return self._with(Member(id, role, pid, node, index, generation=generation))

    def identify(self, id: str, identity: Identity) -> Membership:
        """A process has loaded its part of this model; a group says so before it is ready, a shard before it connects.

        Raises:
            MembershipError: not a living member.
        """
        return self._with(replace(self._alive(id), identity=MappingProxyType(dict(identity))))._formed()

    def ready(self, id: str, address: str) -> Membership:
        """A process can serve at `address`."""
        return self._with(replace(self._alive(id), state=MemberState.READY, address=address))._formed()

    def unready(self, id: str) -> Membership:
        """A process cannot serve for the moment (a shard that waits for the next generation)."""
        return self._with(replace(self._alive(id), state=MemberState.STARTING))

    def drain(self, id: str) -> Membership:
        """A process finishes what it has and takes nothing new."""
        return self._with(replace(self._alive(id), state=MemberState.DRAINING))._formed()

    def lose(self, id: str, reason: str) -> Membership:
        """A process is gone. Losing it twice changes nothing."""
        member = self.members.get(id)
        if member is None or not member.is_alive:
            return self
        return self._with(replace(member, state=MemberState.LOST, reason=reason))._formed()

    def forget(self, id: str) -> Membership:
        """A process left as asked: nothing remains to be shown."""
        if id not in self.members:
            return self
        return replace(self, version=self.version + 1, members=_without(self.members, {id}))._formed()

    @property
    def is_complete(self) -> bool:
        return (
            self.generation > 0
            and len(self.groups) == self.num_groups
            and all(id in self.members and self.members[id].state is MemberState.READY for id in self.groups)
        )

    def view(self) -> View:
        return View(
            epoch=self.epoch,
            version=self.version,
            generation=self.generation,
            is_complete=self.is_complete,
            missing=self._missing(),
            group_addresses=tuple(self.members[id].address if id in self.members else "" for id in self.groups),
            shards={
                member.id: member.address
                for member in self.members.values()
                if member.role is Role.ATTENTION_SHARD and member.state is MemberState.READY
            },
            mismatches=self.mismatches(),
        )

    def mismatches(self) -> dict[str, str]:
        """See `View.mismatches`."""
        return disagreements([*self._ready_groups(), *self._loaded_shards()], self.served)

    def _missing(self) -> tuple[str, ...]:
        missing = []
        for index, id in enumerate(self.groups):
            member = self.members.get(id)
            if member is None or member.state is not MemberState.READY:
                missing.append(f"expert group {index} ({member.reason or member.state if member else 'left'})")
        return tuple(missing)

    def _alive(self, id: str) -> Member:
        member = self.members.get(id)
        if member is None or not member.is_alive:
            raise MembershipError(f"{id} is not a member{f': lost, {member.reason}' if member else ''}")
        return member

    def _with(self, member: Member) -> Membership:
        members = {**self.members, member.id: member}
        lost = [other.id for other in members.values() if not other.is_alive]
        surplus = set(lost[: max(0, len(lost) - NUM_LOST_REMEMBERED)])
        return replace(self, version=self.version + 1, members=_without(members, surplus))

    def _ready_groups(self) -> list[Member]:
        """In group order."""
        groups = [member for member in self.members.values() if member.role is Role.EXPERT_GROUP]
        return sorted((g for g in groups if g.state is MemberState.READY), key=lambda member: member.index)

    def _loaded_shards(self) -> list[Member]:
        """By number; draining ones are on their way out and have no say."""
        shards = [member for member in self.members.values() if member.role is Role.ATTENTION_SHARD]
        loaded = (s for s in shards if s.identity is not None and s.state in (MemberState.STARTING, MemberState.READY))
        return sorted(loaded, key=lambda member: member.index)

    def _formed(self) -> Membership:
        ready = self._ready_groups()
        groups = tuple(member.id for member in ready)
        if len(groups) < self.num_groups or groups == self.groups:
            return self
        claims = {member.generation for member in ready}
        came_back_as_they_were = not self.groups and len(claims) == 1 and claims != {0}
        if not self._have_one_model(ready, stands=came_back_as_they_were):
            return self
        newest = max(claims | {self.generation})
        generation = newest if came_back_as_they_were else newest + 1
        members = {**self.members, **{member.id: replace(member, generation=generation) for member in ready}}
        return replace(
            self,
            version=self.version + 1,
            generation=generation,
            groups=groups,
            served=ready[0].identity,
            members=MappingProxyType(members),
        )

    def _have_one_model(self, groups: list[Member], *, stands: bool) -> bool:
        """Whether these groups may form a generation; `stands`: they are known to have served together."""
        if not agree(groups):
            return False
        if stands or (self.served is not None and groups[0].identity == self.served):
            return True
        shards = self._loaded_shards()
        return bool(shards) and agree([groups[0], *shards])


def _without(members: Mapping[str, Member], ids: set[str]) -> Mapping[str, Member]:
    return MappingProxyType({id: member for id, member in members.items() if id not in ids})
