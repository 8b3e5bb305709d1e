"""What each event does to the membership."""

from __future__ import annotations

import pytest
from memberships import DELAYS, TWICE, adopted, formed, later, prepared, start, with_group, with_shard

from moeray.membership import Membership, MembershipError, MemberState, Role
from moeray.membership.cluster_state import ClusterState
from moeray.membership.state import NUM_LOST_REMEMBERED
from moeray.placement import together


def of(state: ClusterState) -> tuple[int, tuple[str, ...]]:
    return state.current.number, state.current.groups


def test_the_first_generation_is_proposed_when_all_groups_are_ready_and_in_force_when_all_have_prepared_it() -> None:
    state = with_group(with_shard(start(2)), "a")
    assert (state.current.number, state.proposal) == (0, None)
    state = with_group(state, "b")
    view = state.view()
    assert (view.generation, view.proposed, view.proposed_groups) == (0, 1, ("a", "b"))
    state = state.prepared("a", 1)
    assert state.current.number == 0
    view = state.prepared("b", 1).view()
    assert (view.generation, view.proposed, view.groups) == (1, 0, ("a", "b"))
    assert (view.addresses, view.is_complete, view.is_covered) == (("host:a", "host:b"), True, True)


def test_copies_of_one_expert_are_on_different_nodes() -> None:
    nodes = ["left", "right", "left", "right"]
    state = with_shard(start(4, TWICE))
    for number, node in enumerate(nodes):
        state = with_group(state, f"g{number}", node=node)
    placement = prepared(state).current.placement
    assert placement is not None and together(placement, nodes) == 0
    for lost in ({0, 2}, {1, 3}):
        assert placement.covers(lost)


def test_a_lost_group_is_replaced_under_its_number_without_moving_any_expert() -> None:
    before = formed(3)
    state = before.lose("g1", "killed")
    assert (of(state), state.is_complete, state.view().missing) == (
        (1, ("g0", "g1", "g2")), False, ("expert group 1 (killed)",)
    )  # fmt: skip
    assert state.view().addresses == ("host:g0", "", "host:g2")
    state = prepared(with_group(state, "new"))
    assert (of(state), state.is_complete) == ((2, ("g0", "new", "g2")), True)
    assert state.current.placement is not None and before.current.placement is not None
    assert state.current.placement.expert_of_slot == before.current.placement.expert_of_slot


def test_coverage_is_what_the_placement_says() -> None:
    once, twice = formed(3).lose("g1", "killed"), formed(3, TWICE).lose("g1", "killed")
    assert (once.is_covered, twice.is_covered, twice.is_complete) == (False, True, False)
    assert not twice.lose("g0", "killed").is_covered


def test_the_survivors_take_over_when_a_lost_group_has_not_come_back_in_time() -> None:
    state = later(formed(3).lose("g1", "killed"), DELAYS.regroup_s - 0.1)
    assert state.proposal is None
    state = prepared(later(state, 0.2))
    assert (of(state), state.target) == ((2, ("g0", "g2")), 3)
    state = prepared(with_group(state, "back"))
    assert of(state) == (3, ("g0", "back", "g2"))


def test_a_second_loss_long_after_the_first_is_waited_for_anew() -> None:
    healed = later(prepared(with_group(formed(3).lose("g1", "killed"), "new")), 1000.0)
    state = later(healed.lose("g0", "killed"), DELAYS.regroup_s - 0.1)
    assert (healed.is_complete, state.proposal) == (True, None)
    assert later(state, 0.2).view().proposed_groups == ("new", "g2")


def test_a_group_that_joins_and_dies_again_and_again_does_not_keep_the_survivors_waiting() -> None:
    state = formed(3).lose("g1", "killed")
    for attempt in range(13):
        id = f"g1-{attempt}"
        state = later(state.join(id=id, role=Role.EXPERT_GROUP, pid=1, node="n"), 5.0).lose(id, "killed")
    assert state.view().proposed_groups == ("g0", "g2")


def test_groups_beside_those_that_are_wanted_are_taken_in_once_no_other_comes() -> None:
    state = later(with_group(later(with_group(formed(2), "c"), 0.9), "d"), 0.9)
    assert state.proposal is None
    state = prepared(later(state, 0.2))
    assert (of(state), state.target) == ((2, ("g0", "g1", "c", "d")), 4)


def test_scaling_up_waits_for_all_and_is_one_generation() -> None:
    state = later(with_group(formed(2).scale(4), "c"), 30.0)
    assert state.proposal is None
    assert of(prepared(with_group(state, "d"))) == (2, ("g0", "g1", "c", "d"))


def test_scaling_up_takes_what_came_if_the_rest_does_not() -> None:
    state = later(with_group(formed(2).scale(4), "c"), DELAYS.regroup_s)
    assert state.view().proposed_groups == ("g0", "g1", "c")


def test_a_draining_group_serves_until_no_shard_uses_a_generation_with_it() -> None:
    state = formed(3).scale(2).drain("g1")
    view = state.view()
    assert (view.proposed_groups, view.addresses, view.is_complete) == (("g0", "g2"), formed(3).view().addresses, True)
    assert view.may_leave == frozenset()
    state = prepared(state)
    assert (of(state), state.view().may_leave, state.view().oldest) == ((2, ("g0", "g2")), frozenset(), 1)
    state = adopted(state)
    assert (state.view().may_leave, state.view().oldest) == (frozenset({"g1"}), 2)
    state = later(state.forget("g1"), 1000.0)
    assert (of(state), state.proposal, state.target) == ((2, ("g0", "g2")), None, 2)


def test_a_drain_without_a_word_before_it_makes_the_target_smaller_but_not_that_of_a_lost_group() -> None:
    assert formed(3).drain("g1").target == 2
    state = formed(3).lose("g0", "killed").drain("g1")
    assert (state.target, state.proposal) == (2, None), "the lost one is expected back, and has experts of its own"
    assert with_group(state, "new").view().proposed_groups == ("new", "g2")


def test_all_groups_may_leave_when_there_is_no_shard_left() -> None:
    state = formed(2).drain("g0").drain("g1")
    assert state.view().may_leave == frozenset()
    assert state.forget("s").view().may_leave == {"g0", "g1"}


def test_a_draining_process_cannot_become_ready_again() -> None:
    state = formed(2).drain("g0")
    assert state.ready("g0", "host:g0").unready("g0").members["g0"].state is MemberState.DRAINING


@pytest.mark.parametrize("how", ["lose", "drain", "unready", "forget"])
def test_a_proposal_whose_group_goes_is_withdrawn_and_its_number_is_never_used_again(how: str) -> None:
    state = with_group(formed(2).lose("g0", "killed"), "new").prepared("new", 2)
    assert state.view().proposed == 2
    arguments = ("new", "killed") if how == "lose" else ("new",)
    state = getattr(state, how)(*arguments)
    assert (state.current.number, state.proposal is None or state.proposal.number > 2) == (1, True)
    state = prepared(with_group(state.forget("new"), "newer"))
    assert state.current.number > 2 and state.is_complete


def test_news_of_other_generations_than_the_proposed_one_is_ignored_or_refused() -> None:
    state = with_group(formed(2).lose("g0", "killed"), "new")
    assert state.prepared("new", 1) == state and state.prepared("g1", 2).prepared("g1", 2).current.number == 1
    with pytest.raises(MembershipError, match="has prepared generation 3, but the newest is 2"):
        state.prepared("new", 3)
    with pytest.raises(MembershipError, match="g0 is not a member: lost, killed"):
        state.prepared("g0", 2)
    with pytest.raises(MembershipError, match="has adopted generation 2, but 1 is in force"):
        state.adopted("s", 2)
    with pytest.raises(MembershipError, match="only attention shards adopt"):
        state.adopted("g1", 1)
    after = prepared(state)
    assert after.prepared("g1", 2) == after
    moved = after.adopted("s", 2)
    assert moved.adopted("s", 1) == moved, "late news of an older one"


def test_an_older_generation_is_known_as_long_as_a_living_shard_may_use_it() -> None:
    state = prepared(with_group(with_shard(formed(2), "t").lose("g0", "killed"), "new"))
    assert (state.oldest, state.generation(1) is not None) == (1, True)
    state = state.adopted("s", 2)
    assert state.oldest == 1, "the other shard may just be connecting to it"
    gone = state.lose("t", "killed")
    assert (gone.oldest, gone.generation(1), gone.generation(2) is not None) == (2, None, True)
    assert state.adopted("t", 2).oldest == 2
    late = with_shard(adopted(state), "u").adopted("u", 1)
    assert late.oldest == 2, "one that came since has never used it"
    lagging = prepared(with_group(state.lose("g1", "killed"), "newer"))
    assert [number for number in (1, 2, 3) if lagging.generation(number)] == [1, 2, 3]


def test_not_split_is_in_force_at_once_and_has_nothing_to_scale() -> None:
    state = Membership.start(0, TWICE)
    assert (state.current.number, state.is_complete, state.is_covered) == (1, True, True)
    with pytest.raises(MembershipError, match="nothing to scale"):
        state.scale(2)


@pytest.mark.parametrize(("count", "message"), [(0, "1 to 12 can"), (13, "1 to 12 can"), (1, "hold 2 copies")])
def test_impossible_numbers_of_groups_are_refused(count: int, message: str) -> None:
    with pytest.raises(MembershipError, match=message):
        formed(3, TWICE).scale(count)


def test_there_cannot_be_more_groups_than_experts() -> None:
    state = formed(3)
    for number in range(9):
        state = state.join(id=f"more{number}", role=Role.EXPERT_GROUP, pid=1, node="n")
    with pytest.raises(MembershipError, match="one too many: 12 are there already"):
        state.join(id="last", role=Role.EXPERT_GROUP, pid=1, node="n")


def test_only_ready_shards_are_offered_to_an_ingress() -> None:
    state = with_shard(formed(1), "t")
    assert state.view().shards == {"s": "host:s"}
    assert state.ready("t", "h:5").view().shards == {"s": "host:s", "t": "h:5"}
    assert state.unready("s").view().shards == {}
    assert state.drain("s").view().shards == {}


def test_a_lost_process_cannot_report_ready() -> None:
    with pytest.raises(MembershipError, match="lost, killed"):
        formed(1).lose("g0", "killed").ready("g0", "h:1")


def test_only_the_last_of_those_that_were_lost_are_remembered() -> None:
    state = formed(2)
    for number in range(30):
        state = with_group(state, f"x{number}").lose(f"x{number}", "killed")
    lost = [id for id, member in state.members.items() if not member.is_alive]
    assert lost == [f"x{number}" for number in range(30 - NUM_LOST_REMEMBERED, 30)]
    assert {"s", "g0", "g1"} < state.members.keys()


def test_a_group_whose_lease_broke_comes_back_as_itself_and_nothing_changes() -> None:
    state = formed(2).lose("g0", "connection closed")
    assert state.view().lost == frozenset(), "it is not told to end"
    state = state.join(id="g0", role=Role.EXPERT_GROUP, pid=1, node="n", index=0, generation=1)
    state = state.identify("g0", {"fingerprint": "abc"}).ready("g0", "host:g0")
    assert (of(state), state.is_complete, state.proposal) == ((1, ("g0", "g1")), True, None)


def test_a_better_placement_of_the_same_groups_is_proposed_unless_the_state_has_moved_on() -> None:
    state = formed(2)
    placement = state.current.placement
    assert placement is not None
    mirrored = state.propose_placement(placement, based_on=1)
    assert prepared(mirrored).current.placement is not None and prepared(mirrored).current.number == 2
    for moved_on in (mirrored, prepared(mirrored), state.lose("g0", "killed"), prepared(state.drain("g0"))):
        with pytest.raises(MembershipError):
            moved_on.propose_placement(placement, based_on=1)
    with pytest.raises(MembershipError, match="shards still use generation 1"):
        prepared(mirrored).propose_placement(placement, based_on=2)
    with pytest.raises(MembershipError, match="for 2 groups, but there are 3"):
        formed(3).propose_placement(placement, based_on=1)


def test_row_servers_that_serve_are_told_with_their_numbers_and_nothing_else_changes() -> None:
    state = before = formed(1)
    for id in ("r0", "r1"):
        state = state.join(id=id, role=Role.ENGRAM_SERVER, pid=1, node="n")
    state = state.ready("r1", "host:r1")
    assert dict(state.view().row_servers) == {1: "host:r1"}
    state = state.ready("r0", "host:r0").drain("r1")
    assert dict(state.view().row_servers) == {0: "host:r0"}
    again = state.lose("r0", "killed").join(id="r2", role=Role.ENGRAM_SERVER, pid=2, node="n").ready("r2", "host:r2")
    assert dict(again.view().row_servers) == {0: "host:r2"}
    assert of(later(again, 1000.0)) == of(before)
