"""The list of metrics, and what a member's report becomes."""

from __future__ import annotations

import re
from collections import Counter
from typing import Any

import pytest

from moeray.telemetry import FAMILIES, Kind, known_series, samples_of
from moeray.telemetry import families as f

SHARD: dict[str, Any] = {
    "stage": "serving", "running": 3, "waiting": 1, "weights": {"bytes": 100},
    "hop": {
        "generation": 2, "calls": 8, "tokens": 64, "failures": 1, "stalled_us": 2e6, "longest_stall_us": 5e5,
        "stages": {"pack": 10, "exchange": 30}, "dispatch_us": 1e6, "combine_us": 3e6,
        "steps": 2, "step_tokens": 16, "steps_us": 4e6,
    },
    "kv_cache": {
        "choices": {"fetch": 4}, "fetched_tokens": 32,
        "stores": {"node": {"fetched_blocks": 1, "fetched_bytes": 9, "missing_blocks": 2, "given_up": 3,
                            "stored_blocks": 4, "dropped_blocks": 5, "failures": 6, "in_use": False}},
    },
}  # fmt: skip
GROUP: dict[str, Any] = {
    "experts": {
        "bytes": 7, "num_copies": 1, "calls": 5, "calls_us": 2e6, "held": {0: [0, 1], 1: [2, 3]},
        "tokens_per_layer": {0: [10, 30, 0, 0], 1: [0, 0, 1, 4]},
    }
}  # fmt: skip


def values(role: str, report: dict[str, Any]) -> dict[tuple[str, ...], float]:
    """(metric, its labels after role and index) -> value."""
    found = {}
    for each in samples_of(role, 3, report):
        assert len(each.labels) == len(each.family.labels), each.family.name
        assert each.labels[:2] == (role, "3")
        found[each.family.name, *each.labels[2:]] = each.value
    return found


def test_names_follow_what_prometheus_asks_of_them() -> None:
    for family in FAMILIES:
        assert re.fullmatch(r"moeray_[a-z0-9_]+", family.name)
        assert family.name.endswith("_total") == (family.kind is Kind.COUNTER), family.name
        assert bool(family.buckets) == (family.kind is Kind.HISTOGRAM), family.name
        assert list(family.buckets) == sorted(set(family.buckets))
    assert max(Counter(family.name for family in FAMILIES).values()) == 1
    assert {"moeray_ttft_seconds_bucket", "moeray_requests_total"} <= known_series()


def test_the_list_has_every_family_of_its_module() -> None:
    named = {name for name in vars(f) if isinstance(getattr(f, name), f.Family)}
    assert len(named) == len(FAMILIES) > 50


def test_a_shards_report_in_base_units() -> None:
    found = values("attention_shard", SHARD)
    assert found["moeray_member_serving",] == 1
    assert found["moeray_shard_sequences", "running"] == 3
    assert found["moeray_hop_seconds_total", "combine"] == 3.0
    assert found["moeray_hop_stage_seconds", "exchange"] == pytest.approx(30e-6)
    assert found["moeray_hop_stalled_seconds_total",] == 2.0
    assert found["moeray_hop_longest_stall_seconds",] == 0.5
    assert found["moeray_step_seconds_total",] == 4.0
    assert found["moeray_kv_choices_total", "fetch"] == 4
    assert {what: found["moeray_kv_blocks_total", "node", what] for what in
            ("fetched", "missing", "given_up", "stored", "dropped")} == {
        "fetched": 1, "missing": 2, "given_up": 3, "stored": 4, "dropped": 5}  # fmt: skip
    assert found["moeray_kv_tier_in_use", "node"] == 0


def test_a_groups_experts_are_a_few_numbers_for_each_layer() -> None:
    found = values("expert_group", GROUP)
    assert found["moeray_expert_layer_tokens_total", "0"] == 40
    assert found["moeray_expert_layer_hottest_tokens_total", "0"] == 30
    assert found["moeray_expert_layer_hottest_tokens_total", "1"] == 4
    # Of the experts that it holds: 1, 4, 10 and 30 tokens.
    assert {q: found["moeray_expert_tokens", q] for q in ("0.5", "0.9", "1")} == {"0.5": 4, "0.9": 30, "1": 30}


def test_the_number_of_series_does_not_grow_with_the_number_of_experts() -> None:
    def series(num_experts: int) -> int:
        experts = range(num_experts)
        report = {**GROUP["experts"], "held": {0: [*experts]}, "tokens_per_layer": {0: [*experts]}}
        return len(values("expert_group", {"experts": report}))

    assert series(8) == series(384)


@pytest.mark.parametrize(
    "report", [{}, {"stage": "loading"}, {"stage": "serving", "hop": {}, "running": 0, "waiting": 0}]
)
def test_a_process_that_has_not_begun_has_few_numbers(report: dict[str, Any]) -> None:
    found = values("attention_shard", report)
    assert found["moeray_member_serving",] == (report.get("stage") != "loading")
    assert not any(name.startswith(("moeray_hop", "moeray_kv")) for name, *_ in found)


def test_an_engram_servers_rows() -> None:
    found = values("engram_server", {"engram": {"bytes": 10, "rows_sent": 11}})
    assert found["moeray_engram_rows_sent_total",] == 11
