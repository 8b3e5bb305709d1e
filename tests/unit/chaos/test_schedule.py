"""A seed is a schedule."""

from __future__ import annotations

from itertools import islice
from typing import Any

from chaos.faults import FAULTS, Schedule
from chaos.harness import Rounds
from chaos.watching import Counts, is_whole
from hypothesis import given
from hypothesis import strategies as st


@given(st.integers(0, 2**32))
def test_the_same_seed_gives_the_same_faults_and_every_round_has_each_once(seed: int) -> None:
    planned = list(islice(Schedule(seed), 2 * len(FAULTS)))
    assert planned == list(islice(Schedule(seed), 2 * len(FAULTS)))
    for round_ in (planned[: len(FAULTS)], planned[len(FAULTS) :]):
        names = [each.name for each in round_]
        assert sorted(names) == sorted(FAULTS)
        assert names.index("more groups") < names.index("fewer groups")
        assert names.index("more shards") < names.index("fewer shards")


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
