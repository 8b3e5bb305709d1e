"""A controller that is restarted goes on where its predecessor stopped, whether or not that was written down."""

from __future__ import annotations

from dataclasses import replace

import pytest
from memberships import DELAYS, LAYOUT, MODEL, TWICE, adopted, formed, later, prepared, start, with_group, with_shard

from moeray.membership import Membership, MembershipError, Role, SnapshotError
from moeray.membership.snapshot import from_json, to_json
from moeray.placement import Layout


def restarted(state: Membership, layout: Layout = LAYOUT) -> Membership:
    return from_json(to_json(state), layout, DELAYS, epoch=2, now=1000.0)


def back(state: Membership, id: str, generation: int, heard: int = 0) -> Membership:
    member = state.members.get(id)
    role = Role.ATTENTION_SHARD if id.startswith("s") else Role.EXPERT_GROUP
    return state.join(
        id=id, role=role, pid=7, node="n", index=member.index if member else None, generation=generation, heard=heard
    )


def test_the_same_generation_is_published_before_anybody_has_come_back() -> None:
    before = formed(3)
    state = restarted(before)
    old, new = before.view(), state.view()
    assert (new.generation, new.groups, new.addresses, new.is_complete) == (1, old.groups, old.addresses, True)
    assert (new.shards, new.oldest, new.epoch) == (old.shards, 1, 2)
    for id in ("s", "g0", "g1", "g2"):
        state = back(state, id, 1)
    assert (state.awaited, state.proposal, state.view().addresses) == (frozenset(), None, old.addresses)
    assert state.members["g0"].pid == 7


def test_who_does_not_come_back_is_lost_like_anybody_else() -> None:
    state = restarted(formed(3))
    for id in ("s", "g0", "g1"):
        state = back(state, id, 1)
    assert later(state, 500.0).proposal is None, "as long as somebody is awaited, nothing is concluded"
    state = state.lose("g2", "did not come back")
    assert state.view().missing == ("expert group 2 (did not come back)",)
    assert with_group(state, "new").view().proposed_groups == ("g0", "g1", "new")


def test_a_preparation_goes_on() -> None:
    state = restarted(with_group(formed(2).lose("g0", "killed"), "new").prepared("new", 2))
    for id, heard in (("s", 2), ("g1", 2), ("new", 2)):
        state = back(state, id, 1 if id != "new" else 0, heard)
    assert (state.view().proposed, state.prepared("g1", 2).current.number) == (2, 2)


def test_a_commit_that_was_published_but_not_written_holds() -> None:
    proposed = with_group(formed(2).lose("g0", "killed"), "new")
    state = back(restarted(proposed), "s", 2)
    assert (state.current.number, state.current.groups) == (2, ("new", "g1"))
    assert state.adopted("s", 2).oldest == 2


def test_a_proposal_is_not_withdrawn_while_somebody_may_come_who_knows_it_in_force() -> None:
    state = restarted(with_group(formed(2).lose("g0", "killed"), "new")).lose("new", "did not come back")
    assert state.view().proposed == 2
    state = back(state, "s", 2)
    assert (state.current.number, state.view().missing) == (2, ("expert group 0 (did not come back)",))


def test_nothing_is_proposed_while_somebody_may_come_who_heard_of_a_newer_number() -> None:
    state = with_group(back(restarted(formed(2).lose("g0", "killed")), "g1", 1), "new")
    assert (state.awaited, state.proposal) == ({"s"}, None)
    state = back(state, "s", 1, heard=5)
    assert (state.view().proposed, state.view().proposed_groups) == (6, ("new", "g1"))


def a_newer_one_in_force(state: Membership) -> Membership:
    """Group "g0" of two is replaced."""
    return prepared(with_group(state.lose("g0", "killed"), "newer"))


def test_what_a_shard_uses_is_kept_over_a_restart() -> None:
    state = restarted(a_newer_one_in_force(formed(2)))
    assert (state.current.number, state.oldest, state.generation(1) is not None) == (2, 1, True)


@pytest.mark.parametrize("how", ["restart", "restart of one that did not know its model", "broken lease"])
def test_what_a_shard_uses_is_kept_from_the_moment_that_it_is_back(how: str) -> None:
    if how == "broken lease":
        state = formed(2).lose("s", "connection closed")
    else:
        state = restarted(formed(2))
        for id in ("g0", "g1"):
            state = back(state, id, 1)
    if "did not know" in how:
        state = replace(state, floors={})
    state = a_newer_one_in_force(with_shard(back(state, "s", 1), "t")).adopted("t", 2)
    assert (state.current.number, state.oldest, state.generation(1) is not None) == (2, 1, True)
    said = state.identify("s", MODEL)
    assert (said.oldest, said.adopted("s", 1).oldest) == (1, 1)
    assert adopted(said).oldest == 2


def test_without_any_memory_the_next_number_is_above_all_that_was_heard_of() -> None:
    state = start(2)
    for id in ("g1", "g0"):
        state = back(state, id, 4, heard=6).identify(id, MODEL).ready(id, f"host:{id}")
    assert (state.current.number, state.view().proposed) == (0, 7), "they served together: no shard need confirm it"
    assert prepared(state).current.number == 7


def test_without_memory_a_changed_set_of_groups_needs_a_shard_of_the_same_model() -> None:
    state = with_group(back(start(2), "g0", 4).identify("g0", MODEL).ready("g0", "h:1"), "new")
    state = state.prepared("g0", 5).prepared("new", 5)
    assert state.view().generation == 0
    assert with_shard(state).view().generation == 5


def test_an_unknown_generation_that_members_use_is_followed_by_a_new_one_of_the_same_groups() -> None:
    state = restarted(formed(2))
    for id in ("s", "g0", "g1"):
        state = back(state, id, 3, heard=3)
    assert (state.current.number, state.view().proposed, state.view().proposed_groups) == (1, 4, ("g0", "g1"))
    assert adopted(prepared(state)).is_settled


def test_one_that_was_given_up_is_not_taken_back_by_the_next_controller() -> None:
    state = restarted(formed(3, TWICE).accuse("s", "g1", "garbage"), TWICE)
    assert state.view().lost == {"g1"}
    with pytest.raises(MembershipError, match="given up"):
        back(state, "g1", 1)


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"format": 0}', to_json(formed(2)).replace('"newest"', '"n"')])
def test_what_cannot_be_read_is_an_error(text: str) -> None:
    with pytest.raises(SnapshotError):
        from_json(text, LAYOUT, DELAYS, epoch=1, now=0.0)


def test_a_snapshot_of_another_model_is_an_error() -> None:
    with pytest.raises(SnapshotError, match=r"places \[2, 12\] layers and experts, the model has 3, 12"):
        restarted(formed(2), Layout(3, 12))


def test_the_clocks_begin_anew_with_the_controller() -> None:
    state = restarted(formed(3).lose("g1", "killed"))
    for id in ("s", "g0", "g2"):
        state = back(state, id, 1)
    assert later(state, DELAYS.regroup_s - 0.1).proposal is None, "time without a controller is no time to come back in"
    assert later(state, DELAYS.regroup_s + 0.1).view().proposed_groups == ("g0", "g2")

    state = restarted(with_group(formed(2), "c"))
    for id in ("s", "g0", "g1", "c"):
        state = back(state, id, 1 if id != "c" else 0)
    assert later(state, DELAYS.join_debounce_s - 0.1).proposal is None
    assert later(state, DELAYS.join_debounce_s + 0.1).view().proposed_groups == ("g0", "g1", "c")


def test_a_group_does_not_leave_while_what_it_is_proposed_for_may_be_in_force() -> None:
    state = restarted(with_group(formed(2).lose("g0", "killed"), "new")).forget("s")
    state = back(state, "g1", 1).drain("g1")
    assert (state.awaited, state.view().proposed_groups) == ({"new"}, ("new", "g1"))
    assert state.view().may_leave == frozenset(), "no shard is known, but one may come that uses the proposal"


def test_the_first_reason_of_a_loss_stays() -> None:
    state = formed(2).lose("g0", "killed").lose("g0", "silent", give_up=True)
    assert state.view().missing == ("expert group 0 (killed)",)
