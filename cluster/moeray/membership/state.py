"""The membership state machine: events in, a new immutable state out.

A *generation* is one agreed (placement, ordered expert groups). It changes in two phases: a new number is *proposed*,
every group of it loads what it lacks and says `prepared`; then it is *committed*, in force. Shards move to it each at
its own pace and say `adopted`; until none uses an older one, groups keep what that one needs. Numbers never go back, a
proposal that one of its groups did not live to see is withdrawn and its number never used again.

When a new one is proposed:
* the first, when the groups that are wanted (`target`) are ready;
* when the set of ready groups has changed and is whole again (a lost group was replaced, a draining one goes);
* when groups came beside those that are wanted and no other came for `join_debounce_s`: then they are wanted;
* when the set has been less than whole for `regroup_s`: then those that are there take over;
* when somebody has a better placement for the same groups (`propose_placement`).

Only members that serve the same model share a generation. One of a model that was not served before (the first above
all) is proposed if no shard has loaded another model, and committed when at least one shard has loaded it. Once it is
in force its model stands: who has another one takes no part and holds up nobody. `View.mismatches` names who and why.

Every event may come late, twice or never; each says below what it does then. Time enters as `at(now)` alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

from moeray.membership.accusations import Accusation, Charge, convicted, recent
from moeray.membership.agreement import Identity
from moeray.membership.cluster_state import ClusterState, Delays
from moeray.membership.generation import Generation
from moeray.membership.members import Member, MemberState, Role
from moeray.membership.settling import changed, committed, settled
from moeray.placement import Layout, Placement

NUM_LOST_REMEMBERED = 8


class MembershipError(ValueError):
    """An event that does not fit the state, e.g. a report from a process that never joined."""


@dataclass(frozen=True, slots=True)
class Membership(ClusterState):
    """The state and the events that change it; see module docstring."""

    @classmethod
    def start(
        cls, target: int, layout: Layout, delays: Delays | None = None, *, epoch: int = 0, now: float = 0.0
    ) -> Membership:
        """A cluster without members."""
        first = Generation(0 if target else 1)
        return cls(
            layout, delays or Delays(), target, epoch, now=now, newest=first.number, current=first, last_ready=now
        )

    # --- members come and go

    def join(
        self,
        *,
        id: str,
        role: Role,
        pid: int,
        node: str,
        index: int | None = None,
        generation: int = 0,
        heard: int = 0,
    ) -> Membership:
        """A process starts, or comes back: to a restarted controller, or because its lease broke and it did not.

        Args:
            index: the number it had; None gives it the lowest free one of its role.
            generation: the newest one it is part of or has adopted. It is in force, even if this controller only knows
                it as proposed; if it does not know it at all, a newer one is proposed for the same groups.
            heard: the highest number it has heard of, be it only as a proposal; the next is above it.
        Raises:
            MembershipError: it has joined, it was given up, its number is taken, or there are more groups than experts.
        """
        member, heard = self.members.get(id), max(heard, generation)
        if id in self.awaited and member is not None:
            back = replace(member, pid=pid, node=node, generation=max(member.generation, generation))
            return settled(self._with(back, awaited=self.awaited - {id})._used(id, generation)._told(generation, heard))
        if member is not None and member.is_alive:
            raise MembershipError(f"{role} {id} has joined already")
        if member is not None and member.given_up:
            raise MembershipError(f"{role} {id} was given up: {member.reason}")
        taken = {other.index for other in self.members.values() if other.role is role and other.is_alive}
        if index is None:
            index = next(number for number in range(len(taken) + 1) if number not in taken)
        if index in taken:
            raise MembershipError(f"{role} {id} cannot take number {index} back: another process has it")
        if role is Role.EXPERT_GROUP and len(taken) >= self.layout.num_experts:
            raise MembershipError(f"expert group {id} is one too many: {self.layout.num_experts} are there already")
        state = self._with(Member(id, role, pid, node, index, generation=generation))
        if role is Role.EXPERT_GROUP:
            state = state._replaced(index)
        return settled(state._used(id, generation)._told(generation, heard))

    def identify(self, id: str, identity: Identity) -> Membership:
        """A process has opened this model; a group says so before it is ready, a shard before it connects.

        Raises:
            MembershipError: not a living member.
        """
        member = replace(self._alive(id), identity=MappingProxyType(dict(identity)))
        floors = dict(self.floors)
        if member.role is Role.ATTENTION_SHARD:
            floors.setdefault(id, self.current.number)
        return settled(self._with(member, floors=MappingProxyType(floors)))

    def ready(self, id: str, address: str) -> Membership:
        """A process can serve at `address`. A draining one stays what it is: that is for good."""
        member = self._alive(id)
        if member.state is MemberState.DRAINING:
            return self
        came = member.role is Role.EXPERT_GROUP and member.state is not MemberState.READY
        state = self._with(replace(member, state=MemberState.READY, address=address))
        return settled(replace(state, last_ready=self.now) if came else state)

    def unready(self, id: str) -> Membership:
        """A process cannot serve for the moment (a shard that connects to its groups anew)."""
        member = self._alive(id)
        if member.state is MemberState.DRAINING:
            return self
        return settled(self._with(replace(member, state=MemberState.STARTING)))

    def drain(self, id: str) -> Membership:
        """A process finishes what it has and takes nothing new; an expert group is not wanted any more."""
        member = self._alive(id)
        if member.state is MemberState.DRAINING:
            return self
        state = self._with(replace(member, state=MemberState.DRAINING))
        if member.role is Role.EXPERT_GROUP:
            state = replace(state, target=max(1, min(state.target, state.expected_groups())))
        return settled(state)

    def lose(self, id: str, reason: str, *, give_up: bool = False) -> Membership:
        """A process is gone, or (`give_up`) of no use although it may still run. Losing it twice changes nothing."""
        member = self.members.get(id)
        if member is None or not (member.is_alive or (give_up and not member.given_up)):
            return self
        gone = replace(member, state=MemberState.LOST, reason=member.reason or reason, given_up=give_up)
        return settled(self._with(gone, awaited=self.awaited - {id}))

    def forget(self, id: str) -> Membership:
        """A process left as asked: nothing remains to be shown."""
        if id not in self.members:
            return self
        return settled(changed(self, members=_without(self.members, {id}), awaited=self.awaited - {id}))

    # --- generations

    def prepared(self, id: str, generation: int) -> Membership:
        """A group has loaded what it needs in `generation`; of another than the proposed one it is late, and ignored.

        Raises:
            MembershipError: not a living member, or a generation that there never was.
        """
        self._alive(id)
        if generation > self.newest:
            raise MembershipError(f"{id} has prepared generation {generation}, but the newest is {self.newest}")
        proposal = self.proposal
        if proposal is None or generation != proposal.number or id not in proposal.groups or id in self.prepared_by:
            return self
        return settled(changed(self, prepared_by=self.prepared_by | {id}))

    def adopted(self, id: str, generation: int) -> Membership:
        """A shard uses `generation` and none before it. Late news of an older one is ignored.

        Raises:
            MembershipError: not a living shard, or a generation that is not in force yet.
        """
        member = self._alive(id)
        if member.role is not Role.ATTENTION_SHARD:
            raise MembershipError(f"{id} is a {member.role}: only attention shards adopt generations")
        if generation > self.current.number:
            raise MembershipError(f"{id} has adopted generation {generation}, but {self.current.number} is in force")
        if generation <= self.floors.get(id, -1) and generation <= member.generation:
            return self
        floors = MappingProxyType({**self.floors, id: max(generation, self.floors.get(id, 0))})
        adopter = replace(member, generation=max(generation, member.generation))
        return settled(self._with(adopter, floors=floors))

    def accuse(self, by: str, id: str, reason: str, charge: Charge = Charge.BAD) -> Membership:
        """A shard finds a group bad; if that is believed (accusations.py), the group is given up.

        An accusation of a group that nobody uses or that was given up, or by one who is no living shard, changes
        nothing. A group whose lease is gone is given up at once: it is not taken back.
        """
        group, shards = self.members.get(id), self.users()
        is_used = any(id in generation.groups for generation in (*self.past, self.current))
        if group is None or group.given_up or not is_used or by not in {shard.id for shard in shards}:
            return self
        alive = {member.id for member in self.members.values() if member.is_alive}
        said = (*recent(self.accusations, self.now, alive), Accusation(by, id, self.now, charge))
        loses_experts = not self.current.covers(self.absent() | {id})
        if group.is_alive and not convicted(said, id, num_shards=len(shards), loses_experts=loses_experts):
            return replace(self, accusations=said)
        return replace(self, accusations=said).lose(
            id, f"given up: {reason} (says {self.members[by].name})", give_up=True
        )

    def scale(self, num_groups: int) -> Membership:
        """So many expert groups are wanted; they come and go by other hands.

        Raises:
            MembershipError: experts are not remote, or the number is none that the experts can be spread over.
        """
        if not self.target:
            raise MembershipError("experts are not in expert groups here (experts.num_groups is 0): nothing to scale")
        if not 1 <= num_groups <= self.layout.num_experts:
            raise MembershipError(
                f"{num_groups} expert groups cannot share {self.layout.num_experts} routed experts: "
                f"1 to {self.layout.num_experts} can"
            )
        if num_groups < self.layout.min_copies:
            raise MembershipError(
                f"{num_groups} expert groups cannot hold {self.layout.min_copies} copies of each expert "
                "(experts.min_copies)"
            )
        if num_groups == self.target:
            return self
        return settled(changed(self, target=num_groups))

    def propose_placement(self, placement: Placement, based_on: int) -> Membership:
        """Propose another placement for the groups of generation `based_on`.

        Raises:
            MembershipError: the state has moved on, or is on its way, from that generation.
        """
        if self.proposal is not None or based_on != self.current.number or not self.is_settled:
            raise MembershipError(f"a placement for generation {based_on} is of no use now")
        if self.oldest < self.current.number:
            raise MembershipError(f"shards still use generation {self.oldest}; {self.current.number} is in force")
        if placement.num_groups != len(self.current.groups):
            raise MembershipError(
                f"a placement for {placement.num_groups} groups, but there are {len(self.current.groups)}"
            )
        number = self.newest + 1
        proposal = replace(self.current, number=number, placement=replace(placement, generation=number))
        return changed(self, newest=number, proposal=proposal, prepared_by=frozenset())

    def at(self, now: float) -> Membership:
        """The same state at another time."""
        return replace(self, now=now)

    def tick(self) -> Membership:
        """Do what only the passing of time makes right."""
        return settled(self)

    # --- what an event leads to

    def _alive(self, id: str) -> Member:
        member = self.members.get(id)
        if member is None or not member.is_alive:
            raise MembershipError(f"{id} is not a member{f': lost, {member.reason}' if member else ''}")
        return member

    def _with(self, member: Member, **changes: Any) -> Membership:
        members = {**self.members, member.id: member}
        lost = [other.id for other in members.values() if not other.is_alive]
        surplus = set(lost[: max(0, len(lost) - NUM_LOST_REMEMBERED)])
        return changed(self, members=_without(members, surplus), **changes)

    def _used(self, id: str, generation: int) -> Membership:
        """A shard that joins may use `generation`, unless an older one is known of it."""
        if not generation or self.members[id].role is not Role.ATTENTION_SHARD or id in self.floors:
            return self
        return replace(self, floors=MappingProxyType({**self.floors, id: generation}))

    def _told(self, generation: int, heard: int) -> Membership:
        """A member that joins says that `generation` is or was in force, and `heard` was the newest."""
        state = replace(self, newest=max(self.newest, heard), claimed=max(self.claimed, generation))
        if self.proposal is not None and self.proposal.number == generation:
            return committed(state)
        return state

    def _replaced(self, index: int) -> Membership:
        """Lost groups that had this number are not taken back: another one has it now."""
        members = {
            m.id: replace(m, given_up=True)
            if m.role is Role.EXPERT_GROUP and m.index == index and not m.is_alive
            else m
            for m in self.members.values()
        }
        return replace(self, members=MappingProxyType(members))


def _without(members: Mapping[str, Member], ids: set[str]) -> Mapping[str, Member]:
    return MappingProxyType({id: member for id, member in members.items() if id not in ids})
