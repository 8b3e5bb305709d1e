"""Members that serve different models share no generation, and both sides are named."""

from __future__ import annotations

import pytest
from memberships import LAYOUT, adopted, prepared, start, with_group, with_shard

from moeray.membership import Membership, Role

ONE = {"fingerprint": "abc", "dtype": "bfloat16", "rows_version": 1}
OTHER = {**ONE, "fingerprint": "def"}


@pytest.fixture
def state() -> Membership:
    """Two groups and two shards that have joined and opened nothing yet."""
    state = start(2)
    for pid, (id, role) in enumerate(
        [
            ("g0", Role.EXPERT_GROUP),
            ("g1", Role.EXPERT_GROUP),
            ("s0", Role.ATTENTION_SHARD),
            ("s1", Role.ATTENTION_SHARD),
        ]
    ):
        state = state.join(id=id, role=role, pid=pid + 10, node=f"{id}-on-a-node")
    return state


def ready(state: Membership, id: str, identity: dict[str, str]) -> Membership:
    return prepared(state.identify(id, identity).ready(id, f"{id}:1"))


def generation(state: Membership) -> tuple[int, bool]:
    return state.current.number, state.is_complete


def test_two_groups_of_different_models_form_no_generation_and_both_are_named(state: Membership) -> None:
    state = ready(ready(state.identify("s0", ONE), "g0", ONE), "g1", OTHER)
    assert generation(state) == (0, False) and state.proposal is None
    assert state.view().mismatches == {
        "g1": "expert group 1 (node g1-on-a-, pid 11) has fingerprint 'def'; "
        "expert group 0 (node g0-on-a-, pid 10) has fingerprint 'abc'"
    }


def test_a_shard_of_another_model_than_the_groups_keeps_the_first_generation_from_forming(state: Membership) -> None:
    state = ready(ready(state.identify("s0", OTHER), "g0", ONE), "g1", ONE)
    assert generation(state) == (0, False) and state.proposal is None
    assert state.view().mismatches == {
        "s0": "attention shard 0 (node s0-on-a-, pid 12) has fingerprint 'def'; "
        "expert group 0 (node g0-on-a-, pid 10) has fingerprint 'abc'"
    }


def said_prepared(state: Membership) -> Membership:
    for id in state.view().proposed_groups:
        state = state.prepared(id, state.view().proposed)
    return state


def test_groups_load_before_a_shard_has_said_what_it_serves_but_nothing_is_in_force(state: Membership) -> None:
    state = said_prepared(with_two(state))
    assert (state.current.number, state.view().proposed) == (0, 1)
    assert state.identify("s1", ONE).current.number == 1


def test_what_groups_have_loaded_is_withdrawn_when_the_first_shard_has_another_model(state: Membership) -> None:
    state = said_prepared(with_two(state)).identify("s0", OTHER)
    assert (state.current.number, state.proposal, list(state.mismatches())) == (0, None, ["s0"])
    state = state.lose("s0", "replaced").identify("s1", ONE)
    assert said_prepared(state).current.number == 2


def with_two(state: Membership) -> Membership:
    for id in ("g0", "g1"):
        state = state.identify(id, ONE).ready(id, f"{id}:1")
    return state


@pytest.mark.parametrize("how", ["lose", "forget", "drain"])
def test_the_generation_forms_once_the_odd_member_is_gone(state: Membership, how: str) -> None:
    state = ready(ready(state.identify("s0", OTHER), "g0", ONE), "g1", ONE).identify("s1", ONE)
    assert (state.current.number, state.proposal) == (0, None)
    gone = {
        "lose": lambda: state.lose("s0", "x"),
        "forget": lambda: state.forget("s0"),
        "drain": lambda: state.drain("s0"),
    }
    after = prepared(gone[how]())
    assert (after.current.number, after.view().mismatches) == (1, {})


def test_a_shard_that_comes_later_with_another_model_is_left_out_and_harms_nobody(state: Membership) -> None:
    state = ready(ready(state.identify("s0", ONE), "g0", ONE), "g1", ONE).ready("s0", "s0:1")
    state = state.identify("s1", OTHER)
    assert generation(state) == (1, True)
    assert list(state.view().mismatches) == ["s1"]
    state = prepared(with_group(state.lose("g0", "killed"), "new", ONE))
    assert generation(state) == (2, True), "the odd shard does not hold up the next generation"
    assert list(state.view().mismatches) == ["s1"]
    assert adopted(state).oldest == 2, "nor does it keep an old one in use"


def test_a_replacement_group_of_another_model_does_not_complete_the_next_generation(state: Membership) -> None:
    state = ready(ready(state.identify("s0", ONE), "g0", ONE), "g1", ONE)
    state = prepared(with_group(state.lose("g0", "killed"), "new", OTHER))
    assert generation(state) == (1, False)
    assert list(state.view().mismatches) == ["new"], "the generation's own model is the right one"
    state = prepared(with_group(state.lose("new", "killed"), "again", ONE))
    assert generation(state) == (2, True)


def test_all_processes_may_change_to_another_model_together(state: Membership) -> None:
    state = ready(ready(state.identify("s0", ONE), "g0", ONE), "g1", ONE)
    for id in ("g0", "g1", "s0", "s1"):
        state = state.lose(id, "replaced")
    state = said_prepared(with_group(with_group(state, "h0", OTHER), "h1", OTHER))
    assert state.current.number == 1
    state = with_shard(state, "t0", OTHER)
    assert (generation(state), state.view().mismatches, state.served) == ((2, True), {}, OTHER)


def test_every_value_that_differs_is_named(state: Membership) -> None:
    state = ready(ready(state, "g0", ONE), "g1", {"fingerprint": "abc", "dtype": "float32", "rows_version": 2})
    (text,) = state.view().mismatches.values()
    assert "has dtype 'float32', rows_version 2; " in text
    assert text.endswith("has dtype 'bfloat16', rows_version 1")


def test_shards_that_keep_their_experts_are_compared_with_each_other() -> None:
    state = Membership.start(0, LAYOUT)
    for number, identity in enumerate((ONE, ONE, OTHER)):
        state = with_shard(state, f"s{number}", identity)
    assert list(state.view().mismatches) == ["s2"]
