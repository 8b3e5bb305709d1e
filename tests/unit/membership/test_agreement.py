"""Members that serve different models share no generation, and both sides are named."""

from __future__ import annotations

import pytest

from moeray.membership import Membership, Role

ONE = {"fingerprint": "abc", "dtype": "bfloat16", "moeray_version": "1"}
OTHER = {**ONE, "fingerprint": "def"}


def joined(state: Membership, id: str, role: Role, pid: int) -> Membership:
    return state.join(id=id, role=role, pid=pid, node=f"{id}-on-a-node")


@pytest.fixture
def state() -> Membership:
    """Two groups and two shards that have joined and loaded nothing yet."""
    state = Membership.start(2)
    for pid, (id, role) in enumerate(
        [
            ("g0", Role.EXPERT_GROUP),
            ("g1", Role.EXPERT_GROUP),
            ("s0", Role.ATTENTION_SHARD),
            ("s1", Role.ATTENTION_SHARD),
        ]
    ):
        state = joined(state, id, role, pid + 10)
    return state


def ready(state: Membership, id: str, identity: dict[str, str]) -> Membership:
    return state.identify(id, identity).ready(id, f"{id}:1")


def test_two_groups_of_different_models_form_no_generation_and_both_are_named(state: Membership) -> None:
    state = ready(ready(state.identify("s0", ONE), "g0", ONE), "g1", OTHER)
    assert (state.generation, state.is_complete) == (0, False)
    assert state.view().mismatches == {
        "g1": "expert group 1 (node g1-on-a-, pid 11) has fingerprint 'def'; "
        "expert group 0 (node g0-on-a-, pid 10) has fingerprint 'abc'"
    }


def test_a_shard_of_another_model_than_the_groups_keeps_the_first_generation_from_forming(state: Membership) -> None:
    state = ready(ready(state.identify("s0", OTHER), "g0", ONE), "g1", ONE)
    assert (state.generation, state.is_complete) == (0, False)
    assert state.view().mismatches == {
        "s0": "attention shard 0 (node s0-on-a-, pid 12) has fingerprint 'def'; "
        "expert group 0 (node g0-on-a-, pid 10) has fingerprint 'abc'"
    }


def test_no_first_generation_forms_before_a_shard_has_said_what_it_serves(state: Membership) -> None:
    state = ready(ready(state, "g0", ONE), "g1", ONE)
    assert state.generation == 0
    assert state.identify("s1", ONE).generation == 1


@pytest.mark.parametrize("how", ["lose", "forget", "drain"])
def test_the_generation_forms_once_the_odd_member_is_gone(state: Membership, how: str) -> None:
    state = ready(ready(state.identify("s0", OTHER), "g0", ONE), "g1", ONE).identify("s1", ONE)
    assert state.generation == 0
    gone = {
        "lose": lambda: state.lose("s0", "x"),
        "forget": lambda: state.forget("s0"),
        "drain": lambda: state.drain("s0"),
    }
    after = gone[how]()
    assert (after.generation, after.view().mismatches) == (1, {})


def test_a_shard_that_comes_later_with_another_model_is_left_out_and_harms_nobody(state: Membership) -> None:
    state = ready(ready(state.identify("s0", ONE), "g0", ONE), "g1", ONE).ready("s0", "s0:1")
    state = state.identify("s1", OTHER)
    assert (state.generation, state.is_complete) == (1, True)
    assert list(state.view().mismatches) == ["s1"]
    state = ready(joined(state.lose("g0", "killed"), "new", Role.EXPERT_GROUP, 20), "new", ONE)
    assert (state.generation, state.is_complete) == (2, True), "the odd shard does not hold up the next generation"
    assert list(state.view().mismatches) == ["s1"]


def test_a_replacement_group_of_another_model_does_not_complete_the_next_generation(state: Membership) -> None:
    state = ready(ready(state.identify("s0", ONE), "g0", ONE), "g1", ONE)
    state = ready(joined(state.lose("g0", "killed"), "new", Role.EXPERT_GROUP, 20), "new", OTHER)
    assert (state.generation, state.is_complete) == (1, False)
    assert list(state.view().mismatches) == ["new"], "the generation's own model is the right one"
    state = ready(joined(state.lose("new", "killed"), "again", Role.EXPERT_GROUP, 21), "again", ONE)
    assert (state.generation, state.is_complete) == (2, True)


def test_all_processes_may_change_to_another_model_together(state: Membership) -> None:
    state = ready(ready(state.identify("s0", ONE), "g0", ONE), "g1", ONE)
    for pid, (old, new) in enumerate([("g0", "h0"), ("g1", "h1"), ("s0", "t0")]):
        state = joined(state.lose(old, "replaced"), new, state.members[old].role, pid)
    state = ready(ready(state, "h0", OTHER), "h1", OTHER)
    assert state.generation == 1
    state = state.identify("t0", OTHER)
    assert (state.generation, state.is_complete, state.view().mismatches) == (2, True, {})


def test_every_value_that_differs_is_named(state: Membership) -> None:
    state = ready(ready(state, "g0", ONE), "g1", {"fingerprint": "abc", "dtype": "float32", "moeray_version": "2"})
    (text,) = state.view().mismatches.values()
    assert "has dtype 'float32', moeray_version '2'; " in text
    assert text.endswith("has dtype 'bfloat16', moeray_version '1'")


def test_shards_that_keep_their_experts_are_compared_with_each_other(state: Membership) -> None:
    state = Membership.start(0)
    for number, identity in enumerate((ONE, ONE, OTHER)):
        id = f"s{number}"
        state = joined(state, id, Role.ATTENTION_SHARD, number).identify(id, identity)
    assert list(state.view().mismatches) == ["s2"]
