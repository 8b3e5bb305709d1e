"""What the controller knows, and what follows from it. Nothing here changes it: see state.py."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from moeray.membership.accusations import Accusation
from moeray.membership.agreement import Identity, agree, disagreements
from moeray.membership.generation import Generation
from moeray.membership.members import Member, MemberState, Role
from moeray.membership.view import View
from moeray.placement import Layout


@dataclass(frozen=True, slots=True)
class Delays:
    """How long the state machine waits; see module docstring."""

    join_debounce_s: float = 1.0
    regroup_s: float = 60.0


@dataclass(frozen=True, slots=True)
class ClusterState:
    """The whole state.

    Attributes:
        target: expert groups that are wanted; 0: no expert is remote, and generation 1 is in force at once.
        now: seconds on the caller's clock.
        newest: the highest number there ever was.
        claimed: the highest one that a member said to be part of when it joined; this controller may not know it.
        current: the generation in force.
        proposal: the one that is being prepared, and by whom it was.
        past: those before `current` that a living shard may still use, oldest first.
        floors: shard -> oldest generation that it may use.
        served: identity of the model in force; None before the first, and without remote groups.
        awaited: members that the controller's predecessor knew and that have not come back yet; they count as before.
        accusations: what shards said of groups lately.
        unsettled_since: when the ready groups began to differ from those of `current`; None while they do not.
        last_ready: when a group last became ready.
    """

    layout: Layout
    delays: Delays
    target: int
    epoch: int = 0
    version: int = 0
    now: float = 0.0
    newest: int = 0
    claimed: int = 0
    current: Generation = field(default_factory=lambda: Generation(0))
    proposal: Generation | None = None
    prepared_by: frozenset[str] = frozenset()
    past: tuple[Generation, ...] = ()
    floors: Mapping[str, int] = field(default_factory=lambda: MappingProxyType({}))
    served: Identity | None = None
    members: Mapping[str, Member] = field(default_factory=lambda: MappingProxyType({}))
    awaited: frozenset[str] = frozenset()
    accusations: tuple[Accusation, ...] = ()
    unsettled_since: float | None = None
    last_ready: float = 0.0

    @property
    def is_complete(self) -> bool:
        return self.current.number > 0 and not self.absent()

    @property
    def is_covered(self) -> bool:
        return self.current.number > 0 and self.current.covers(self.absent())

    @property
    def is_settled(self) -> bool:
        """Whether the generation in force is that of the groups that are ready now."""
        if not self.target:
            return True
        ids = tuple(member.id for member in self.candidates())
        return ids == self.current.groups and self.current.number >= max(1, self.claimed)

    @property
    def oldest(self) -> int:
        """No living shard uses a generation before this one."""
        return min([self.current.number, *(self.floors.get(shard.id, 0) for shard in self.users())])

    def generation(self, number: int) -> Generation | None:
        """The one in force, proposed or still used that has this number."""
        known = (*self.past, self.current, *([self.proposal] if self.proposal else []))
        return next((generation for generation in known if generation.number == number), None)

    def view(self) -> View:
        current, proposal = self.current, self.proposal
        return View(
            epoch=self.epoch,
            version=self.version,
            generation=current.number,
            groups=current.groups,
            addresses=tuple(self._address(id) for id in current.groups),
            is_complete=self.is_complete,
            is_covered=self.is_covered,
            missing=self.missing(),
            proposed=proposal.number if proposal else 0,
            proposed_groups=proposal.groups if proposal else (),
            oldest=self.oldest,
            lost=frozenset(m.id for m in self.members.values() if m.role is Role.EXPERT_GROUP and m.given_up),
            draining=frozenset(m.id for m in self.members.values() if m.state is MemberState.DRAINING),
            may_leave=self.may_leave(),
            shards={member.id: member.address for member in self._ready(Role.ATTENTION_SHARD)},
            row_servers={member.index: member.address for member in self._ready(Role.ENGRAM_SERVER)},
            mismatches=self.mismatches(),
        )

    def mismatches(self) -> dict[str, str]:
        """See `View.mismatches`."""
        return disagreements([*self._ready_groups(), *self._loaded_shards()], self.served)

    def candidates(self) -> list[Member]:
        """The groups that a generation may be proposed to, in group order: ready, and of one model.

        That is the one in force, as long as a group has it. Another one (the first above all) must be that of all
        groups, and of all shards that have said what they have, unless the groups are known to have served together.
        """
        ready = self._ready_groups()
        faithful = [member for member in ready if self.served is not None and member.identity == self.served]
        if faithful:
            return faithful
        if not ready or not agree(ready):
            return []
        return ready if _served_together(ready) or agree([ready[0], *self._loaded_shards()]) else []

    def is_confirmed(self, candidates: list[Member]) -> bool:
        """Whether their model is what this cluster serves: it was in force, or a shard has it too."""
        was_served = self.served is not None and candidates[0].identity == self.served
        return was_served or _served_together(candidates) or bool(self._loaded_shards())

    def _address(self, id: str) -> str:
        member = self.members.get(id)
        return member.address if member is not None and member.serves else ""

    def missing(self) -> tuple[str, ...]:
        """See `View.missing`."""
        lines = []
        for id, index in zip(self.current.groups, self.current.indices, strict=True):
            member = self.members.get(id)
            if member is None or not member.serves:
                lines.append(f"expert group {index} ({member.reason or member.state if member else 'left'})")
        return tuple(lines)

    def absent(self) -> frozenset[str]:
        """The groups of the generation in force that do not serve."""
        return frozenset(id for id in self.current.groups if not self._address(id))

    def may_leave(self) -> frozenset[str]:
        """See `View.may_leave`."""
        needed = set(self.proposal.groups if self.proposal else ())
        if self.users():
            needed.update(id for generation in (*self.past, self.current) for id in generation.groups)
        return frozenset(
            m.id
            for m in self.members.values()
            if m.role is Role.EXPERT_GROUP and m.state is MemberState.DRAINING and m.id not in needed
        )

    def users(self) -> list[Member]:
        """The shards that may use a generation: alive, and of the model in force as far as they have said."""
        return [
            member
            for member in self.members.values()
            if member.id in self.floors and member.is_alive
            and (member.identity is None or self.served is None or member.identity == self.served)
        ]  # fmt: skip

    def expected_groups(self) -> int:
        """Groups that are there to stay or will be: the living that do not drain, and one for each that was lost."""
        groups = [m for m in self.members.values() if m.role is Role.EXPERT_GROUP]
        staying = [m for m in groups if m.is_alive and m.state is not MemberState.DRAINING]
        taken = {m.index for m in groups if m.is_alive}
        vacant = [index for index in self.current.indices if index not in taken]
        return len(staying) + len(vacant)

    def _ready_groups(self) -> list[Member]:
        """In group order."""
        return sorted(self._ready(Role.EXPERT_GROUP), key=lambda member: member.index)

    def _ready(self, role: Role) -> list[Member]:
        return [each for each in self.members.values() if each.role is role and each.state is MemberState.READY]

    def _loaded_shards(self) -> list[Member]:
        """By number; draining ones are on their way out and have no say."""
        shards = [member for member in self.members.values() if member.role is Role.ATTENTION_SHARD]
        loaded = (s for s in shards if s.identity is not None and s.state in (MemberState.STARTING, MemberState.READY))
        return sorted(loaded, key=lambda member: member.index)


def _served_together(groups: list[Member]) -> bool:
    claims = {member.generation for member in groups}
    return len(claims) == 1 and claims != {0}
