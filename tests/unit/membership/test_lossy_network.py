"""The two-phase change against processes that die and messages that are lost, late, doubled and out of order.

Groups and shards behave as the real ones do (a view in, messages out); the controller may be killed at any moment, and
then goes on from a snapshot that is some events old.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test
from memberships import DELAYS, MODEL, TWICE, start

from moeray.membership import Charge, Generation, Membership, MembershipError, MemberState, Role, View
from moeray.membership.snapshot import from_json, to_json

NUM_OLD_SNAPSHOTS = 3
Event = Callable[[Membership], Membership]


@dataclass
class Process:
    """An expert group or an attention shard, and what it knows.

    Attributes:
        generation: in use (shard), or the newest it serves in (group).
        held: of a group: generations whose experts it has.
        contents: what each number it has heard of stands for: it must never mean something else.
        outbox: messages on their way to the controller.
        may_be_stale: of a shard: the controller did not count on it for a while, so that its generation may be gone.
    """

    id: str
    role: Role
    index: int | None = None
    generation: int = 0
    heard: int = 0
    prepared: int = 0
    held: set[int] = field(default_factory=set)
    contents: dict[int, tuple[str, ...]] = field(default_factory=dict)
    outbox: list[Event] = field(default_factory=list)
    is_draining: bool = False
    may_be_stale: bool = False

    def join(self, state: Membership) -> Membership:
        return state.join(
            id=self.id, role=self.role, pid=1, node="n", index=self.index, generation=self.generation, heard=self.heard
        )

    def introduce_itself(self) -> None:
        """What follows a successful join."""
        self.outbox = [lambda s: s.identify(self.id, MODEL), lambda s: s.ready(self.id, f"host:{self.id}")]
        if self.role is Role.ATTENTION_SHARD and self.generation:
            self.say_adopted(self.generation)
        if self.prepared:
            self.say_prepared(self.prepared)
        if self.is_draining:
            self.outbox.append(lambda s: s.drain(self.id))

    def say_adopted(self, number: int) -> None:
        self.outbox.append(lambda s: s.adopted(self.id, number))

    def say_prepared(self, number: int) -> None:
        self.outbox.append(lambda s: s.prepared(self.id, number))

    def hear(self, view: View) -> None:
        self.heard = max(self.heard, view.generation, view.proposed)
        for number, groups in ((view.generation, view.groups), (view.proposed, view.proposed_groups)):
            if number:
                assert self.contents.setdefault(number, groups) == groups, f"{number} stands for two things"


class Cluster(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.state = start(3, TWICE)
        self.count = 0
        self.epoch = 1
        self.processes: dict[str, Process] = {}
        self.snapshots = [to_json(self.state)]
        self.has_prepared: set[tuple[str, int]] = set()
        self.was_in_force: set[int] = set()  # numbers that this life of the controller has known in force
        self.newest_in_force = 0  # of any life
        for role in (*[Role.EXPERT_GROUP] * 3, *[Role.ATTENTION_SHARD] * 2):
            self.a_process_starts(role)
        while self.state.oldest < 1:  # what is worth to be seen begins with a cluster that serves
            self.settle_once()

    # --- the controller

    def apply(self, event: Event) -> bool:
        """As the actor does: an event that is refused changes nothing."""
        before = self.state
        try:
            self.state = event(before)
        except MembershipError:
            return False
        if self.state.current.number > before.current.number:
            for id in self.state.current.groups:
                assert (id, self.state.current.number) in self.has_prepared, "committed, but not prepared by all"
        assert self.state.version >= before.version and self.state.current.number >= before.current.number
        assert (self.state.version == before.version) <= (to_json(self.state) == to_json(before))
        text = to_json(self.state)
        if text != self.snapshots[-1]:
            self.snapshots = [*self.snapshots, text][-NUM_OLD_SNAPSHOTS:]
        self.remember()
        return True

    def remember(self) -> None:
        """After every change of the state: what has been in force, and who is not counted on."""
        self.was_in_force.update(generation.number for generation in (*self.state.past, self.state.current))
        self.newest_in_force = max(self.newest_in_force, *self.was_in_force)
        for process in self.processes.values():
            process.may_be_stale |= not self.knows(process)

    @rule(seconds=st.sampled_from([0.1, 2.0, 61.0]))
    def time_passes(self, seconds: float) -> None:
        self.apply(lambda s: s.at(s.now + seconds).tick())

    @rule(age=st.integers(1, NUM_OLD_SNAPSHOTS), come_back=st.booleans())
    def the_controller_is_killed(self, age: int, come_back: bool) -> None:
        self.epoch += 1
        text = self.snapshots[-min(age, len(self.snapshots))]
        self.state = from_json(text, TWICE, DELAYS, epoch=self.epoch, now=0.0)
        self.snapshots = [text]
        self.was_in_force = set()
        self.remember()
        for process in self.processes.values():
            process.may_be_stale |= bool(process.generation) and process.id not in self.state.floors
            process.outbox = []
        for process in self.processes.values():
            if come_back:
                self.comes(process)

    @precondition(lambda self: self.state.awaited)
    @rule()
    def who_does_not_come_back_is_lost(self) -> None:
        for id in sorted(self.state.awaited):
            self.apply(lambda s, id=id: s.lose(id, "did not come back"))

    @rule(num_groups=st.integers(2, 5))
    def scale(self, num_groups: int) -> None:
        self.apply(lambda s: s.scale(num_groups))

    @rule(is_followed=st.booleans())
    def the_same_groups_get_a_better_placement(self, is_followed: bool) -> None:
        current = self.state.current
        if current.placement is not None:
            placement = current.placement
            self.apply(lambda s: s.propose_placement(placement, current.number))
        if is_followed:
            self.all_groups_follow()

    # --- processes

    def some(self, data: st.DataObject, role: Role | None = None) -> Process | None:
        ids = sorted(id for id, process in self.processes.items() if role in (None, process.role))
        return self.processes[data.draw(st.sampled_from(ids))] if ids else None

    @precondition(lambda self: len(self.processes) < 9)
    @rule(role=st.sampled_from([Role.EXPERT_GROUP, Role.EXPERT_GROUP, Role.ATTENTION_SHARD]), is_prompt=st.booleans())
    def a_process_starts(self, role: Role, is_prompt: bool = True) -> None:
        self.count += 1
        process = Process(f"{'g' if role is Role.EXPERT_GROUP else 's'}{self.count}", role)
        self.processes[process.id] = process
        self.comes(process)
        while is_prompt and process.outbox:
            self.apply(process.outbox.pop(0))

    def comes(self, process: Process) -> None:
        if self.apply(process.join):
            process.index = self.state.members[process.id].index
            if process.generation == self.newest_in_force:
                process.may_be_stale = False  # nobody can have been told to release that
            process.introduce_itself()

    @rule(data=st.data())
    def a_process_that_is_not_known_joins_again(self, data: st.DataObject) -> None:
        process = self.some(data)
        if process is not None and (process.id in self.state.awaited or not self.knows(process)):
            self.comes(process)

    @rule(data=st.data(), is_seen=st.booleans())
    def a_process_is_killed(self, data: st.DataObject, is_seen: bool) -> None:
        """`is_seen` False: its lease breaks, but it goes on."""
        process = self.some(data)
        if process is None:
            return
        if is_seen:
            del self.processes[process.id]
        self.apply(lambda s: s.lose(process.id, "connection closed"))

    @rule(data=st.data())
    def a_group_drains(self, data: st.DataObject) -> None:
        process = self.some(data, Role.EXPERT_GROUP)
        if process is not None:
            process.is_draining = True
            process.outbox.append(lambda s: s.drain(process.id))

    @rule(data=st.data(), charge=st.sampled_from(Charge))
    def a_shard_accuses_a_group(self, data: st.DataObject, charge: Charge) -> None:
        by, of = self.some(data, Role.ATTENTION_SHARD), self.some(data, Role.EXPERT_GROUP)
        if by is not None and of is not None:
            by.outbox.append(lambda s: s.accuse(by.id, of.id, "accused", charge))

    @rule(data=st.data(), fate=st.sampled_from(["deliver", "deliver", "deliver", "double", "lose"]))
    def a_message_travels(self, data: st.DataObject, fate: str) -> None:
        """Any one that is on its way: they overtake each other."""
        ids = sorted(id for id, process in self.processes.items() if process.outbox)
        if not ids:
            return
        outbox = self.processes[data.draw(st.sampled_from(ids))].outbox
        place = data.draw(st.integers(0, len(outbox) - 1))
        event = outbox[place]
        if fate != "double":
            del outbox[place]
        if fate != "lose":
            self.apply(event)

    @rule(data=st.data(), sees_the_view=st.booleans())
    def everything_one_process_said_travels(self, data: st.DataObject, sees_the_view: bool) -> None:
        process = self.some(data)
        if process is None:
            return
        while process.outbox:
            self.apply(process.outbox.pop(0))
        if sees_the_view:
            self.see(process)

    @rule(data=st.data())
    def a_process_sees_the_view(self, data: st.DataObject) -> None:
        process = self.some(data)
        if process is not None:
            self.see(process)

    @rule()
    def those_that_ended_are_replaced(self) -> None:
        """As Serve does."""
        while sum(p.role is Role.EXPERT_GROUP and self.knows(p) for p in self.processes.values()) < self.state.target:
            self.a_process_starts(Role.EXPERT_GROUP)
        self.all_groups_follow()

    @rule()
    def all_groups_follow(self) -> None:
        """Whatever is proposed comes in force, and what may be released is, while the shards are where they were."""
        for _ in range(2):  # what they prepare; what they may release once that is in force
            for process in list(self.processes.values()):
                if process.role is Role.EXPERT_GROUP:
                    self.see(process)
                    while process.outbox:
                        self.apply(process.outbox.pop(0))

    def see(self, process: Process) -> None:
        view = self.state.view()
        if not self.knows(process):
            return  # it only knows that it must join
        process.hear(view)
        if process.role is Role.EXPERT_GROUP:
            self.group_sees(process, view)
        elif process.id not in self.state.floors:
            return  # it connects to no group before it was told that its model is known
        elif view.generation > process.generation:
            if all(id in self.processes and view.generation in self.processes[id].held for id in view.groups):
                process.generation = view.generation
                process.may_be_stale = False
                process.say_adopted(view.generation)
        elif view.generation == process.generation:
            process.say_adopted(view.generation)

    def group_sees(self, group: Process, view: View) -> None:
        if group.id in view.lost or (group.is_draining and group.id in view.may_leave):
            del self.processes[group.id]
            self.apply(lambda s: s.forget(group.id))
            return
        group.held = {number for number in group.held if number >= view.oldest}
        if group.id in view.groups:
            group.generation = max(group.generation, view.generation)
        if group.id in view.proposed_groups:
            group.held.add(view.proposed)
            group.prepared = view.proposed
            self.has_prepared.add((group.id, view.proposed))
            group.say_prepared(view.proposed)

    def knows(self, process: Process) -> bool:
        member = self.state.members.get(process.id)
        return member is not None and member.is_alive

    # --- what must hold

    def counted_on(self) -> list[Process]:
        """The shards that use a generation, as far as the controller has known all the time."""
        shards = [process for process in self.processes.values() if process.role is Role.ATTENTION_SHARD]
        return [shard for shard in shards if shard.generation and self.knows(shard) and not shard.may_be_stale]

    @invariant()
    def no_group_was_asked_to_release_what_a_living_shard_uses(self) -> None:
        for shard in self.counted_on():
            for id in shard.contents[shard.generation]:
                if id in self.processes and self.knows(self.processes[id]):
                    assert shard.generation in self.processes[id].held

    @invariant()
    def no_group_may_release_or_leave_what_a_living_shard_uses(self) -> None:
        view = self.state.view()
        for shard in self.counted_on():
            assert view.oldest <= shard.generation
            assert not view.may_leave.intersection(shard.contents[shard.generation])

    @invariant()
    def what_a_living_shard_uses_is_known(self) -> None:
        for shard in self.counted_on():
            if shard.generation in self.was_in_force:
                known = self.state.generation(shard.generation)
                assert known is not None and known.groups == shard.contents[shard.generation]

    @invariant()
    def what_nobody_uses_is_not_kept(self) -> None:
        assert all(generation.number >= self.state.oldest for generation in self.state.past)

    @invariant()
    def coverage_is_what_the_placement_says(self) -> None:
        state, current = self.state, self.state.current
        assert state.is_covered == covered_by_hand(state, current)
        assert not state.is_complete or state.is_covered

    @invariant()
    def a_snapshot_is_the_state(self) -> None:
        text = to_json(self.state)
        assert to_json(from_json(text, TWICE, DELAYS, epoch=9, now=5.0)) == text

    @invariant()
    def no_two_living_groups_share_a_number(self) -> None:
        groups = [m for m in self.state.members.values() if m.role is Role.EXPERT_GROUP and m.is_alive]
        assert len({m.index for m in groups}) == len(groups)
        for generation in (self.state.current, *([self.state.proposal] if self.state.proposal else [])):
            assert list(generation.indices) == sorted(set(generation.indices))

    @invariant()
    def used_generations_are_known(self) -> None:
        numbers = [generation.number for generation in (*self.state.past, self.state.current)]
        assert numbers == sorted(set(numbers))
        assert self.state.newest >= max(numbers) and self.state.oldest <= self.state.current.number

    def teardown(self) -> None:
        """Once messages flow again, all agree on one generation of all the groups there are."""
        self.a_process_starts(Role.ATTENTION_SHARD)
        for _ in range(16):
            while sum(p.role is Role.EXPERT_GROUP and not p.is_draining for p in self.processes.values()) < 5:
                self.a_process_starts(Role.EXPERT_GROUP)  # as Serve does for those that ended
            self.settle_once()
        groups = {p.id for p in self.processes.values() if p.role is Role.EXPERT_GROUP and not p.is_draining}
        state = self.state
        assert (set(state.current.groups), state.proposal, state.awaited) == (groups, None, frozenset())
        assert state.is_complete and state.is_settled and state.oldest == state.current.number
        shards = [p for p in self.processes.values() if p.role is Role.ATTENTION_SHARD]
        assert all(shard.generation == state.current.number for shard in shards)
        assert not any(p.is_draining for p in self.processes.values() if p.role is Role.EXPERT_GROUP)

    def settle_once(self) -> None:
        for process in list(self.processes.values()):
            if process.id in self.state.awaited or not self.knows(process):
                self.comes(process)
                if not self.knows(process):
                    del self.processes[process.id]  # it was given up: it ends, and Serve starts another one
                    continue
            member = self.state.members[process.id]
            if member.state is MemberState.STARTING or member.identity is None:
                process.introduce_itself()
            if process.is_draining:
                process.outbox.append(lambda s, id=process.id: s.drain(id))  # type: ignore[misc]
        for id in sorted(self.state.awaited):
            self.apply(lambda s, id=id: s.lose(id, "did not come back"))
        for id, member in self.state.members.items():
            if member.is_alive and id not in self.processes:
                self.apply(lambda s, id=id: s.lose(id, "connection closed"))
        for process in list(self.processes.values()):
            while process.outbox:
                self.apply(process.outbox.pop(0))
            if process.id in self.processes:
                self.see(process)
        self.time_passes(61.0)


def covered_by_hand(state: Membership, current: Generation) -> bool:
    if not current.number or current.placement is None:
        return False
    placement, living = current.placement, set[tuple[int, int]]()
    for layer, experts in enumerate(placement.expert_of_slot):
        slot = 0
        for id, num_slots in zip(current.groups, placement.slots_per_group, strict=True):
            member: Any = state.members.get(id)
            if member is not None and member.state in (MemberState.READY, MemberState.DRAINING) and member.address:
                living |= {(layer, expert) for expert in experts[slot : slot + num_slots]}
            slot += num_slots
    return len(living) == placement.num_layers * placement.num_experts


TestCluster = Cluster.TestCase
TestCluster.settings = settings(max_examples=80, stateful_step_count=40, deadline=None)


@pytest.mark.full
@pytest.mark.timeout(1800)
def test_the_same_at_length() -> None:
    run_state_machine_as_test(Cluster, settings=settings(max_examples=1500, stateful_step_count=70, deadline=None))
