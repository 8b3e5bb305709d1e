"""Whom to believe that an expert group is bad."""

from __future__ import annotations

import pytest
from memberships import TWICE, formed, later, prepared, with_group, with_shard

from moeray.membership import Charge, Membership, MembershipError, Role
from moeray.membership.accusations import SLOW_TIMES, WINDOW_S


@pytest.fixture
def covered() -> Membership:
    return with_shard(formed(3, TWICE), "t")


def given_up(state: Membership) -> frozenset[str]:
    return state.view().lost


def test_a_bad_group_whose_experts_have_copies_is_given_up_at_once(covered: Membership) -> None:
    state = covered.accuse("s", "g1", "not a number")
    assert (given_up(state), state.is_covered, state.view().addresses[1]) == ({"g1"}, True, "")
    assert "given up: not a number (says attention shard 0" in state.members["g1"].reason


def test_a_second_one_is_not_given_up_if_its_experts_would_be_lost_by_that(covered: Membership) -> None:
    state = covered.accuse("s", "g1", "not a number")
    assert given_up(state.accuse("s", "g2", "not a number")) == {"g1"}


def test_the_last_copies_are_given_up_when_most_shards_find_them_bad() -> None:
    state = with_shard(formed(2), "t")
    one = state.accuse("s", "g0", "garbage").accuse("s", "g0", "garbage")
    assert given_up(one) == frozenset()
    assert given_up(one.accuse("t", "g0", "slow", Charge.SLOW)) == frozenset()
    assert given_up(one.accuse("t", "g0", "garbage")) == {"g0"}
    assert given_up(one.lose("t", "killed").accuse("s", "g0", "garbage")) == {"g0"}, "the only shard is most of them"


def test_a_slow_group_is_given_up_when_that_was_said_often_within_a_minute(covered: Membership) -> None:
    state = covered
    for _ in range(SLOW_TIMES - 1):
        state = state.accuse("s", "g1", "slow", Charge.SLOW)
    assert given_up(state) == frozenset()
    assert given_up(later(state, WINDOW_S).accuse("s", "g1", "slow", Charge.SLOW)) == frozenset()
    assert given_up(state.accuse("t", "g1", "slow", Charge.SLOW)) == {"g1"}


def test_accusations_by_strangers_or_of_strangers_change_nothing(covered: Membership) -> None:
    state = covered.join(id="new", role=Role.EXPERT_GROUP, pid=1, node="n")
    for by, group in (("nobody", "g1"), ("g0", "g1"), ("s", "nobody"), ("s", "new"), ("s", "t")):
        assert state.accuse(by, group, "garbage") == state
    assert state.lose("s", "killed").accuse("s", "g1", "garbage").view().lost == frozenset()


def test_one_that_was_given_up_is_not_taken_back_even_if_it_had_been_lost_before(covered: Membership) -> None:
    for state in (covered, covered.lose("g1", "connection closed")):
        after = state.accuse("s", "g1", "garbage")
        assert given_up(after) == {"g1"}
        with pytest.raises(MembershipError, match="g1 was given up"):
            after.join(id="g1", role=Role.EXPERT_GROUP, pid=1, node="n", index=1, generation=1)
        assert prepared(with_group(after, "new")).is_complete


def test_a_broken_lease_alone_gives_nobody_up_until_another_has_its_number(covered: Membership) -> None:
    state = covered.lose("g1", "connection closed")
    assert given_up(state) == frozenset()
    assert given_up(with_group(state, "new")) == {"g1"}
