"""Invariants of the membership state machine."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, invariant, rule

from moeray.membership import Membership, MembershipError, MemberState, Role
from moeray.membership.state import NUM_LOST_REMEMBERED


def with_shard(state: Membership, id: str = "s", **identity: object) -> Membership:
    """A shard that has loaded its model and waits for a generation."""
    return state.join(id=id, role=Role.ATTENTION_SHARD, pid=1, node="n").identify(id, identity)


def with_groups(num_groups: int) -> Membership:
    state = with_shard(Membership.start(num_groups), "first")
    for group in range(num_groups):
        state = state.join(id=f"g{group}", role=Role.EXPERT_GROUP, pid=1, node="n").identify(f"g{group}", {})
        state = state.ready(f"g{group}", f"host:{group}")
    return state


def test_first_generation_forms_when_every_group_is_ready() -> None:
    state = with_shard(Membership.start(2))
    state = state.join(id="a", role=Role.EXPERT_GROUP, pid=1, node="n").identify("a", {}).ready("a", "h:1")
    assert state.generation == 0 and not state.is_complete
    state = state.join(id="b", role=Role.EXPERT_GROUP, pid=2, node="n").identify("b", {})
    assert state.generation == 0
    state = state.ready("b", "h:2")
    assert (state.generation, state.is_complete) == (1, True)
    assert state.view().group_addresses == ("h:1", "h:2")


def test_loss_keeps_the_generation_but_marks_it_incomplete_until_a_replacement_forms_the_next() -> None:
    state = with_groups(2).lose("g0", "killed")
    assert (state.generation, state.is_complete) == (1, False)
    assert state.view().missing == ("expert group 0 (killed)",)
    state = state.join(id="new", role=Role.EXPERT_GROUP, pid=3, node="n").identify("new", {})
    assert state.members["new"].index == 0, "the replacement takes the lost group's number"
    state = state.ready("new", "h:9")
    assert (state.generation, state.is_complete) == (2, True)
    assert state.view().group_addresses == ("h:9", "host:1")


def test_a_group_too_many_is_refused_with_the_arithmetic() -> None:
    with pytest.raises(MembershipError, match="all 2 group numbers are taken"):
        with_groups(2).join(id="third", role=Role.EXPERT_GROUP, pid=1, node="n")


def test_not_split_forms_generation_one_without_groups() -> None:
    assert Membership.start(0).view().is_complete
    assert Membership.start(0).generation == 1


def test_only_ready_shards_are_offered_to_an_ingress() -> None:
    state = with_shard(with_groups(1))
    assert not state.view().shards
    assert state.ready("s", "h:5").view().shards == {"s": "h:5"}
    assert not state.ready("s", "h:5").unready("s").view().shards
    assert not state.ready("s", "h:5").drain("s").view().shards


def test_a_lost_process_cannot_report_ready() -> None:
    with pytest.raises(MembershipError, match="lost, killed"):
        with_groups(1).lose("g0", "killed").ready("g0", "h:1")


def rejoined(claims: dict[str, int]) -> Membership:
    state = Membership.start(len(claims))
    for index, (id, generation) in reversed(list(enumerate(claims.items()))):
        state = state.join(id=id, role=Role.EXPERT_GROUP, pid=1, node="n", index=index, generation=generation)
    for id in claims:
        state = state.identify(id, {}).ready(id, f"h:{id}")
    return state


def test_after_a_controller_restart_an_unchanged_generation_goes_on() -> None:
    state = rejoined({"a": 4, "b": 4})
    assert (state.generation, state.is_complete, state.view().group_addresses) == (4, True, ("h:a", "h:b"))
    with pytest.raises(MembershipError, match="cannot take number 1 back"):
        state.join(id="c", role=Role.EXPERT_GROUP, pid=1, node="n", index=1)


def test_after_a_controller_restart_a_changed_set_of_groups_is_a_new_generation() -> None:
    for claims in ({"a": 4, "new": 0}, {"a": 4, "b": 3}):
        assert rejoined(claims).generation == 0, "nobody knows yet that a shard has the same model"
        assert with_shard(rejoined(claims)).generation == 5


class Churn(RuleBasedStateMachine):
    """Any order of joins, readiness, losses and departures."""

    ids = Bundle("ids")

    def __init__(self) -> None:
        super().__init__()
        self.state = Membership.start(3)
        self.count = 0
        self.before = self.state

    @rule(target=ids, role=st.sampled_from([Role.EXPERT_GROUP, Role.ATTENTION_SHARD]))
    def join(self, role: Role) -> str:
        self.count += 1
        id = f"m{self.count}"
        try:
            self.state = self.state.join(id=id, role=role, pid=self.count, node="n")
        except MembershipError:
            assert role is Role.EXPERT_GROUP
        return id

    @rule(id=ids, fingerprint=st.sampled_from("aaab"))
    def ready(self, id: str, fingerprint: str) -> None:
        try:
            self.state = self.state.identify(id, {"fingerprint": fingerprint}).ready(id, f"h:{id}")
        except MembershipError:
            member = self.state.members.get(id)
            assert member is None or member.state is MemberState.LOST

    @rule(id=ids)
    def lose(self, id: str) -> None:
        self.state = self.state.lose(id, "gone")

    @rule(id=ids)
    def forget(self, id: str) -> None:
        self.state = self.state.forget(id)

    @invariant()
    def numbers_never_go_back(self) -> None:
        assert self.state.version >= self.before.version
        assert self.state.generation >= self.before.generation
        self.before = self.state

    @invariant()
    def no_two_living_groups_share_a_number(self) -> None:
        numbers = [m.index for m in self.state.members.values() if m.role is Role.EXPERT_GROUP and m.is_alive]
        assert len(numbers) == len(set(numbers)) and all(number < 3 for number in numbers)

    @invariant()
    def a_complete_generation_names_living_ready_groups_in_order(self) -> None:
        if self.state.is_complete:
            groups = [self.state.members[id] for id in self.state.groups]
            assert [group.index for group in groups] == [0, 1, 2]
            assert all(group.state is MemberState.READY for group in groups)
            assert all(group.identity == self.state.served for group in groups)

    @invariant()
    def who_serves_another_model_than_the_generation_is_named(self) -> None:
        if self.state.is_complete:
            odd = {
                member.id
                for member in self.state.members.values()
                if member.role is Role.ATTENTION_SHARD and member.is_alive and member.identity is not None
                and member.identity != self.state.served
            }  # fmt: skip
            assert self.state.view().mismatches.keys() == odd

    @invariant()
    def lost_members_are_bounded(self) -> None:
        assert sum(not m.is_alive for m in self.state.members.values()) <= NUM_LOST_REMEMBERED


TestChurn = Churn.TestCase
TestChurn.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
