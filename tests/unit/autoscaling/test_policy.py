"""What the policy promises, whatever the load: steady under a steady load, monotone, within limits, safe when blind."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
from autoscaling_plant import STEP_S, Plant
from hypothesis import given, settings
from hypothesis import strategies as st

from moeray.autoscaling import (
    Goals,
    GroupLoad,
    Limits,
    Memory,
    Observation,
    Percentile,
    PolicySettings,
    ShardLoad,
    decide,
)
from moeray.autoscaling.policy import PoolMemory
from moeray.autoscaling.trend import Trend

SETTINGS = PolicySettings(Goals(2.0, 0.1), Limits(1, 40), Limits(1, 40))
QUIET = ShardLoad(running=1, waiting=0, max_running=64, kv_use=0.01, expert_wait=0.2)


def seen(*shards: ShardLoad, **others: object) -> Observation:
    given = {"groups": (GroupLoad(0.1),) * 2, "tokens_per_s": 10.0, **others}
    return Observation(1000.0, 12.0, shards, **given)  # type: ignore[arg-type]


def directions(counts: list[int]) -> list[int]:
    """+1 and -1, one for each run of changes the same way."""
    changes = [1 if after > before else -1 for before, after in pairwise(counts) if after != before]
    return [way for number, way in enumerate(changes) if not number or changes[number - 1] != way]


loads = st.builds(
    ShardLoad, running=st.integers(0, 80), waiting=st.integers(0, 200), max_running=st.integers(1, 128),
    kv_use=st.floats(0, 1), expert_wait=st.floats(0, 1), age_s=st.sampled_from([0.0, 5.0, 60.0]),
)  # fmt: skip
latencies = st.none() | st.builds(Percentile, st.floats(0, 20), st.sampled_from([0.0, 60.0]))
observations = st.builds(
    Observation, now_s=st.floats(1000, 5000), hour=st.floats(0, 24, exclude_max=True),
    shards=st.lists(loads, max_size=12).map(tuple),
    groups=st.lists(st.builds(GroupLoad, st.floats(0, 1), st.sampled_from([0.0, 60.0])), max_size=12).map(tuple),
    joining_shards=st.integers(0, 5), joining_groups=st.integers(0, 5), tokens_per_s=st.none() | st.floats(0, 1e6),
    ttft=latencies, tpot=latencies,
)  # fmt: skip
pool_memories = st.builds(
    PoolMemory, st.floats(0.01, 1e5) | st.just(float("inf")), st.floats(0, 1000), st.floats(0, 1000),
    st.none() | st.floats(0, 1000),
)  # fmt: skip
memories = st.builds(
    Memory, st.builds(Trend, st.floats(0, 1e5), st.floats(-100, 100), st.floats(0, 999)), pool_memories, pool_memories
)


@settings(max_examples=25, deadline=None)
@given(
    tokens=st.floats(10, 20_000), shards=st.integers(1, 30), groups=st.integers(1, 30),
    shard_tokens=st.floats(500, 4000), group_tokens=st.floats(500, 8000), noise=st.floats(0, 0.03),
)  # fmt: skip
def test_a_steady_load_is_met_without_swinging(
    tokens: float, shards: int, groups: int, shard_tokens: float, group_tokens: float, noise: float
) -> None:
    plant = Plant(replace(SETTINGS, in_s=60.0), shards, groups, shard_tokens, group_tokens)
    counts: list[tuple[int, int]] = []
    for number in range(round(2 * 3600 / STEP_S)):
        decision = plant.step(tokens * (1 + noise * (-1) ** number))
        assert decision.groups is not None
        counts.append((decision.shards.count, decision.groups.count))
    for pool in zip(*counts, strict=True):
        assert len(directions(list(pool))) <= 5, "too far in either direction once or twice: then it is known"
        assert not directions(list(pool[len(pool) // 2 :]))
    if max(tokens / shard_tokens, tokens / group_tokens) < 30:
        ttft = plant.observe(tokens).ttft
        assert ttft is not None and ttft.p95_s <= SETTINGS.goals.ttft_p95_s


@given(memories, observations)
def test_numbers_stay_within_limits_and_steps_and_above_what_requests_hold(memory: Memory, now: Observation) -> None:
    _, decision = decide(SETTINGS, memory, now)
    for wanted, have, limits in (
        (decision.shards, len(now.shards) + now.joining_shards, SETTINGS.shards),
        (decision.groups, len(now.groups) + now.joining_groups, SETTINGS.groups),
    ):
        assert wanted is not None and limits is not None and wanted.reason
        assert wanted.count >= have - max(limits.step_in, have // 10)
        assert wanted.count <= max(have + max(limits.step_out, have), limits.fewest)
        assert limits.fewest <= wanted.count <= max(limits.most, have)
    if decision.shards.count < len(now.shards) + now.joining_shards:
        slots = sum(each.max_running for each in now.shards) / len(now.shards)
        assert decision.shards.count * slots >= sum(each.running for each in now.shards) - 1e-6
        assert decision.shards.count >= sum(each.kv_use for each in now.shards) - 1e-6


@given(memories, observations)
def test_nothing_shrinks_on_numbers_that_are_old_or_missing(memory: Memory, now: Observation) -> None:
    _, decision = decide(SETTINGS, memory, now)
    is_blind = now.tokens_per_s is None or not now.shards or any(each.age_s > 10 for each in now.shards)
    if is_blind and len(now.shards) + now.joining_shards <= SETTINGS.shards.most:
        assert decision.shards.count >= len(now.shards) + now.joining_shards
    if any(each.age_s > 10 for each in now.groups):
        assert decision.groups is not None
        assert decision.groups.count >= len(now.groups) + now.joining_groups


@given(memories, observations, st.integers(0, 100), st.integers(0, 100), st.floats(0, 1), st.floats(1, 5))
def test_more_load_never_wants_fewer(
    memory: Memory, now: Observation, running: int, waiting: int, kv: float, times: float
) -> None:
    heavier = replace(
        now,
        shards=tuple(
            replace(
                each, running=each.running + running, waiting=each.waiting + waiting, kv_use=each.kv_use + kv
            )
            for each in now.shards
        ),
        groups=tuple(replace(each, busy=min(1.0, each.busy * times)) for each in now.groups),
        tokens_per_s=None if now.tokens_per_s is None else now.tokens_per_s * times,
    )  # fmt: skip
    light, heavy = (decide(SETTINGS, memory, each)[1] for each in (now, heavier))
    assert light.shards.count <= heavy.shards.count
    assert light.groups is not None and heavy.groups is not None and light.groups.count <= heavy.groups.count


def test_a_missed_goal_lets_the_pool_grow_that_the_steps_wait_for() -> None:
    late = Percentile(3.0)
    for wait, shards, groups in ((0.1, 2, 2), (0.9, 1, 3)):
        _, decision = decide(SETTINGS, Memory(), seen(replace(QUIET, expert_wait=wait), ttft=late))
        assert decision.groups is not None
        assert (decision.shards.count, decision.groups.count) == (shards, groups)
        grown = decision.groups if wait > 0.5 else decision.shards
        assert grown.reason.endswith("for the goal: time to first token p95 is 3 s, the goal 2 s")


@pytest.mark.parametrize(("cost_of_groups", "grows"), [(1.0, "groups"), (9.0, "shards")])
def test_where_either_would_help_the_cheaper_one_grows(cost_of_groups: float, grows: str) -> None:
    policy = replace(SETTINGS, shards=Limits(1, 9, cost=5.0), groups=Limits(1, 9, cost=cost_of_groups))
    _, decision = decide(policy, Memory(), seen(replace(QUIET, expert_wait=0.5), ttft=Percentile(3.0)))
    assert decision.groups is not None
    assert ((decision.shards.count > 1), (decision.groups.count > 2)) == (grows == "shards", grows == "groups")


def test_a_rising_rate_is_met_before_it_is_there() -> None:
    ahead, behind = (Plant(replace(SETTINGS, join_s=seconds), 2, 9) for seconds in (60.0, 0.0))
    first_growth = []
    for plant in (ahead, behind):
        plant.memory = Memory(shards=PoolMemory(too_much=900.0))
        for number in range(400):
            if plant.step(600.0 + 20 * number).shards.count > 2:
                first_growth.append(number)
                break
    assert first_growth[0] + 5 < first_growth[1]


def test_at_night_fewer_are_enough_and_in_the_morning_there_are_more_at_once() -> None:
    policy = replace(SETTINGS, shards=Limits(4, 9, fewest_at_night=1), night=(22.0, 6.0))
    plant = Plant(policy, shards=4, groups=2)
    for hour, expected in ((21.9, 4), (23.5, 1), (5.9, 1), (6.1, 4)):
        plant.hour = hour
        for _ in range(round(1800 / STEP_S)):
            wanted = plant.step(10.0).shards
        assert wanted.count == expected
    assert replace(policy, night=(1.0, 5.0)).is_night(0.5) is False and replace(policy, night=(1.0, 5.0)).is_night(3)


def test_a_load_that_was_too_much_once_is_managed_when_it_is_seen_to_be() -> None:
    memory = Memory(shards=PoolMemory(too_much=10.0), tokens=Trend(50.0, 0.0, 900.0))
    later, _ = decide(SETTINGS, memory, seen(QUIET, tokens_per_s=50.0))
    assert later.shards.too_much == 50.0
    missed, _ = decide(SETTINGS, later, seen(QUIET, QUIET, tokens_per_s=50.0, ttft=Percentile(3.0)))
    assert missed.shards.too_much == 25.0


def test_the_further_a_goal_is_missed_the_more_a_pool_grows_but_no_more_than_it_may() -> None:
    wanted = [
        decide(SETTINGS, Memory(), seen(*(QUIET,) * 10, tpot=Percentile(late)))[1].shards.count
        for late in (0.09, 0.101, 0.15, 0.19, 5.0)
    ]
    assert wanted == [10, 12, 15, 15, 15]


@pytest.mark.parametrize("rate", [None, 0.0])
def test_a_missed_goal_counts_though_nobody_knows_the_rate(rate: float | None) -> None:
    _, decision = decide(SETTINGS, Memory(), seen(QUIET, QUIET, tokens_per_s=rate, tpot=Percentile(1.0)))
    assert decision.shards.count == 3 and "the goal: time per token" in decision.shards.reason


def test_of_a_load_that_has_just_begun_it_is_not_learned_how_much_is_too_much() -> None:
    """The rate is that of the last minute: while it is still growing, it says less than was asked for."""
    full, memory = replace(QUIET, running=64, waiting=64), Memory()
    for second in range(10):
        memory, _ = decide(SETTINGS, memory, replace(seen(full, tokens_per_s=100.0 * second), now_s=float(second)))
    assert memory.shards.too_much == float("inf")
    for second in range(10, 400):
        memory, _ = decide(SETTINGS, memory, replace(seen(full, tokens_per_s=1000.0), now_s=float(second)))
    assert memory.shards.too_much == pytest.approx(1000, rel=0.2)


def test_a_standby_is_there_beside_what_the_load_needs() -> None:
    def settled(standby: int) -> int:
        plant = Plant(replace(SETTINGS, shards=Limits(1, 40, standby=standby)), 4, 4)
        plant.memory = Memory(shards=PoolMemory(too_much=100.0))
        for _ in range(round(3600 / STEP_S)):
            wanted = plant.step(300.0).shards
        return wanted.count

    assert settled(standby=2) == settled(standby=0) + 2


def test_limits_that_contradict_each_other_are_refused() -> None:
    for wrong in ({"fewest": 3, "most": 2}, {"fewest_at_night": 2}, {"step_out": 0}, {"cost": -1.0}, {"standby": -1}):
        with pytest.raises(ValueError):
            Limits(**wrong)  # type: ignore[arg-type]
