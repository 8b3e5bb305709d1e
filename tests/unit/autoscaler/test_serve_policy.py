"""What Ray Serve hands over becomes the right observation, and the decision what Serve is to do."""

from __future__ import annotations

from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
from transport_peers import eventually

from moeray.autoscaler import serve_policy
from moeray.autoscaler.observing import observed
from moeray.autoscaler.serve_policy import EVERY_S, ServePolicy
from moeray.autoscaler.settings import POOLS, policy_settings
from moeray.autoscaling import GroupLoad, Percentile, ShardLoad, Wanted
from moeray.config import parse_config

NOW = 1_700_000_000.0
QUIET = {"running": 1.0, "waiting": 0.0, "max_running": 8.0, "kv_use": 0.1, "expert_wait": 0.2}


@dataclass
class Context:
    """What of Serve's AutoscalingContext is read."""

    running_replicas: list[str]
    target_num_replicas: int
    raw_metrics: dict[str, dict[str, list[Any]]] | None = field(default_factory=dict)

    @classmethod
    def of(cls, *said: dict[str, float], target: int | None = None, at: float = NOW) -> Context:
        """One replica for each; the last sample counts."""
        metrics: dict[str, dict[str, list[Any]]] = {}
        for number, values in enumerate(said):
            for name, value in values.items():
                samples = [SimpleNamespace(timestamp=at - 1, value=-1.0), SimpleNamespace(timestamp=at, value=value)]
                metrics.setdefault(name, {})[f"r{number}"] = samples
        replicas = [f"r{number}" for number in range(len(said))]
        return cls(replicas, len(replicas) if target is None else target, metrics)


def seen(shards: Context, groups: Context | None, ingresses: Context) -> Any:
    return observed(shards, groups, ingresses, now_s=5.0, time_s=NOW + 2, hour=3.0)


def test_the_latest_of_every_replica_is_seen_with_its_age_and_who_is_on_its_way() -> None:
    front = {"tokens_per_s": 100.0, "ttft_p95_s": 0.5}
    found = seen(
        Context.of(QUIET, QUIET | {"running": 7.0}, target=3), Context.of({"busy": 0.4}),
        Context.of(front, front | {"ttft_p95_s": 1.5, "tpot_p95_s": 0.05}),
    )  # fmt: skip
    assert found.shards == (ShardLoad(1, 0, 8, 0.1, 0.2, 2.0), ShardLoad(7, 0, 8, 0.1, 0.2, 2.0))
    assert (found.joining_shards, found.joining_groups, found.groups) == (1, 0, (GroupLoad(0.4, 2.0),))
    assert (found.tokens_per_s, found.ttft, found.tpot) == (200.0, Percentile(1.5, 2.0), Percentile(0.05, 2.0))


def test_who_has_said_nothing_or_not_all_is_one_of_whom_nothing_is_known() -> None:
    shards = Context.of(QUIET, {"running": 3.0})
    shards.running_replicas.append("new")
    found = seen(shards, Context.of({}), Context.of({"tokens_per_s": 1.0}, {}))
    assert [each.age_s for each in found.shards] == [2.0, float("inf"), float("inf")]
    assert [each.age_s for each in found.groups] == [float("inf")]
    assert found.tokens_per_s is None and found.ttft is None
    assert seen(Context(["a"], 1, None), None, Context.of({})).shards[0].age_s == float("inf")


def contexts(**pools: Context) -> dict[Any, Context]:
    names = {pool: name for name, pool in POOLS.items()}
    return {Key(names[pool]): context for pool, context in pools.items()}


@dataclass(frozen=True)
class Key:
    name: str


def test_serve_is_told_numbers_and_the_log_why(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    clock = [100.0]
    monkeypatch.setattr(serve_policy, "monotonic", lambda: clock[0])
    monkeypatch.setattr(serve_policy, "time", lambda: NOW)
    noted: list[dict[str, Wanted]] = []
    monkeypatch.setattr(serve_policy, "_tell", noted.append)
    caplog.set_level("INFO", logger="ray.serve")
    policy = ServePolicy({"autoscaling": {"attention": {"most": 4}}})
    late = {"tokens_per_s": 100.0, "ttft_p95_s": 9.0}
    asked = contexts(
        attention=Context.of(QUIET, QUIET), experts=Context.of({"busy": 0.1}, {"busy": 0.1}), ingress=Context.of(late)
    )
    told, state = policy(asked)
    assert ({key.name: count for key, count in told.items()}, state) == ({"AttentionShard": 3, "ExpertGroup": 2}, {})
    assert "autoscaling, attention: 2 -> 3 for the goal: time to first token p95 is 9 s, the goal 2 s" in caplog.text
    assert eventually(lambda: [set(each) for each in noted] == [{"attention", "experts"}])
    asked[Key("AttentionShard")].target_num_replicas = 3
    clock[0] += EVERY_S / 2
    assert policy(asked)[0] == told
    assert policy(contexts(attention=Context.of(QUIET))) == ({}, {})


def test_a_pool_without_bounds_keeps_its_number() -> None:
    settings = policy_settings(parse_config({"autoscaling": {"attention": {"most": 9, "cost_per_hour": 2.0}}}))
    assert (settings.shards.fewest, settings.shards.most, settings.shards.cost) == (1, 9, 2.0)
    assert settings.groups is not None and (settings.groups.fewest, settings.groups.most) == (2, 2)
    assert policy_settings(parse_config({"experts": {"num_groups": 0}})).groups is None
