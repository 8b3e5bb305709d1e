"""A seed is a schedule."""

from __future__ import annotations

import threading
from collections import Counter
from itertools import islice
from types import SimpleNamespace
from typing import Any

from chaos.faults import FAULTS, Planned, Schedule
from chaos.harness import MAX_AGAIN, Again, Rounds
from chaos.report import Event
from chaos.watching import Counts, is_whole
from hypothesis import given
from hypothesis import strategies as st


@given(st.integers(0, 2**32))
def test_the_same_seed_gives_the_same_faults_and_every_round_has_each_once(seed: int) -> None:
    planned = list(islice(Schedule(seed).rounds(), 2))
    assert planned == list(islice(Schedule(seed).rounds(), 2))
    for round_ in planned:
        names = [each.name for each in round_]
        assert sorted(names) == sorted(FAULTS)
        assert names.index("more groups") < names.index("fewer groups")
        assert names.index("more shards") < names.index("fewer shards")


def test_what_is_repeated_comes_as_often_as_wanted_right_after_the_first_round_which_it_does_not_change() -> None:
    schedule = Schedule(5, repeats={"kill group": 3, "kill engine": 2})
    first, again, *others = islice(schedule.rounds(), 4)
    assert first == next(Schedule(5).rounds())
    assert Counter(each.name for each in again) == {"kill group": 2, "kill engine": 1}
    for other in others:
        assert sorted(each.name for each in other) == sorted(FAULTS)
    assert len({each.seed for each in first + again}) == len(FAULTS) + 3
    assert (schedule.num_rounds, Schedule(5).num_rounds) == (2, 1)


def test_the_rounds_of_a_schedule_are_complete_only_when_what_is_repeated_was_taken() -> None:
    schedule = Schedule(5, ["kill group", "cut link"], repeats={"kill group": 3})
    rounds, taken = Rounds(schedule), []
    while rounds.completed < schedule.num_rounds:
        planned = rounds.take(frozenset())
        assert planned is not None
        taken.append(planned.name)
    assert Counter(taken) == {"kill group": 3, "cut link": 1}


def test_what_must_be_alone_waits_for_the_others_and_is_not_forgotten() -> None:
    schedule = Schedule(5, ["kill group", "cut link"])
    rounds = Rounds(schedule)
    first, nothing = (rounds.take(frozenset(), {"kill group"}) for _ in range(2))
    last = rounds.take(frozenset())
    assert first is not None and last is not None and nothing is None
    assert (first.name, last.name, rounds.completed) == ("cut link", "kill group", 1)


def test_what_struck_where_no_watched_stream_was_comes_again_a_few_times() -> None:
    def struck(*moved: str, name: str = "kill engine", over: bool = True) -> Any:
        event = Event(name, 1, moved_ids=list(moved))
        fault = SimpleNamespace(event=event, planned=Planned(name, 1, 0.0), is_over=threading.Event())
        if over:
            fault.is_over.set()
        return fault

    again = Again({"kill engine"})
    assert not again.is_owed([]) and not again.is_owed([struck("chaos-watched-3")])
    assert not again.is_owed([struck(name="cut link")])
    under_way = [struck(over=False)]
    assert again.is_owed(under_way) and again.take(under_way) is None
    for _ in range(MAX_AGAIN):
        planned = again.take([struck("chaos-4")])
        assert planned is not None and (planned.name, planned.seed) == ("kill engine", 2)
    assert not again.is_owed([struck()]) and again.take([struck()]) is None


@given(st.integers(0, 2**32), st.lists(st.sampled_from(["", "groups", "shards", "ingresses"])))
def test_what_harms_a_busy_pool_waits_and_nothing_is_forgotten(seed: int, busy: list[str]) -> None:
    rounds, taken = Rounds(Schedule(seed)), []
    for pool in busy + [""] * 2 * len(FAULTS):
        planned = rounds.take(frozenset({pool}))
        if planned is None:
            continue
        assert pool not in FAULTS[planned.name].pools
        taken.append(planned.name)
        if rounds.completed == 1:
            break
    assert sorted(taken) == sorted(FAULTS)
    assert taken.index("more groups") < taken.index("fewer groups")
    assert taken.index("more shards") < taken.index("fewer shards")


def test_a_cluster_is_whole_only_without_what_cannot_be_repaired() -> None:
    roles = ["controller", "attention_shard", "attention_shard", "expert_group", "ingress"]
    processes: list[dict[str, Any]] = [
        {"role": role, "id": str(pid), "pid": pid, "state": "ready"} for pid, role in enumerate(roles)
    ]
    processes[1]["engine_pid"] = 77
    state = {"generation": 2, "is_complete": True, "proposed": None, "oldest_generation": 2, "processes": processes}
    counts = Counts(shards=2, groups=1, ingresses=1)
    assert is_whole(state, counts) and is_whole(state, counts, {99})
    assert not is_whole(state, counts, {3}) and not is_whole(state, counts, {77})
    for change in ({"is_complete": False}, {"proposed": {"generation": 3}}, {"oldest_generation": 1}):
        assert not is_whole(state | change, counts)
    processes[3]["state"] = "starting"
    assert not is_whole(state, counts) and not is_whole(state, counts, pools={"groups"})
    assert is_whole(state, counts, pools={"shards", "ingresses", "controller"})
    assert not is_whole(state, counts, {77}, pools={"ingresses"})
