"""Counters since the start become shares of the time since the last question."""

from __future__ import annotations

import pytest

from moeray.attention_shard.link import ShardInfo
from moeray.attention_shard.load import LoadSince


def info(steps_us: float, dispatch_us: float, combine_us: float) -> ShardInfo:
    return ShardInfo(
        shard="s", state="ready", pid=1, engine_pid=2, vllm="v", model="m", generation=1, num_running=3, num_waiting=4,
        num_requests=7, max_running=8, kv_use=0.5, links=[], kv_cache={},
        hop={"steps_us": steps_us, "dispatch_us": dispatch_us, "combine_us": combine_us},
    )  # fmt: skip


def test_waiting_for_experts_is_a_share_of_the_steps_since_the_last_question() -> None:
    load = LoadSince()
    assert load.of(info(1000, 100, 200)) == {
        "running": 3, "waiting": 4, "max_running": 8, "kv_use": 0.5, "expert_wait": pytest.approx(0.3)
    }  # fmt: skip
    assert load.of(info(2000, 200, 900))["expert_wait"] == pytest.approx(0.8)
    assert load.of(info(2000, 200, 900))["expert_wait"] == pytest.approx(0.8), "no step since: what it was"
    assert load.of(info(3000, 200, 900))["expert_wait"] == 0.0


def test_an_engine_that_counts_no_steps_waits_for_nobody() -> None:
    load = LoadSince()
    assert load.of(info(0, 100, 200))["expert_wait"] == 0.0
