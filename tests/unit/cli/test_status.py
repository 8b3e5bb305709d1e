"""`moeray status` shows where compute threads are, what shares a core, and which steps are cut in halves."""

from __future__ import annotations

from typing import Any

from moeray.cli.status import render

HOP = {"calls": 10, "dispatch_us": 500.0, "overlap_us": 300.0, "combine_us": 200.0}


def state(*processes: dict[str, Any], warnings: list[str] | None = None) -> dict[str, Any]:
    common = {"id": "x", "pid": 1, "node": "n" * 56, "state": "ready"}
    return {
        "model": "m", "generation": 1, "is_complete": True, "endpoints": None, "mismatches": [],
        "warnings": warnings or [], "processes": [common | each for each in processes],
    }  # fmt: skip


def row(process: dict[str, Any]) -> str:
    return render(state(process)).splitlines()[-1]


def test_cores_relay_and_numa_node_are_shown() -> None:
    place = {"cores": [2, 3], "numa_node": 1, "threads": 2}
    assert "2,3 (numa 1)" in row({"role": "expert_group", **place})
    assert "2,3 relay 7 (numa 1)" in row({"role": "attention_shard", "relay_core": 7, **place})
    assert "2,3 (numa 1)" in row({"role": "attention_shard", "relay_core": 2, **place})
    assert "(numa several)" in row({"role": "expert_group", **place, "numa_node": None})


def test_what_a_row_server_holds_is_shown() -> None:
    rows = {"columns": [4, 5], "tables": 2, "rows_sent": 10, "bytes": 1, "checkpoint": "c"}
    assert row({"role": "engram_server", "engram": rows}).endswith("2 hash columns x 2 tables, 10 rows sent")


def test_warnings_stand_above_the_table() -> None:
    lines = render(state({"role": "controller"}, warnings=["node n: too few cores"])).splitlines()
    assert lines[1] == "warning: node n: too few cores"


def test_the_plan_of_micro_batches_is_shown_with_both_times() -> None:
    measured = [{"tokens": 512, "whole_ms": 985.2, "halves_ms": 652.1}]
    cut = {"micro_batches": {"from_tokens": 512, "measured": measured}}
    whole = {"micro_batches": {"from_tokens": None, "measured": measured}}
    never = {"micro_batches": {"from_tokens": None, "measured": []}}
    assert row({"role": "attention_shard", "hop": HOP | cut}).endswith(
        "10 layer calls, 100 us each, steps of 512+ tokens in halves (512: 985 -> 652 ms)"
    )
    assert row({"role": "attention_shard", "hop": HOP | whole}).endswith("no step in halves (512: 985 -> 652 ms)")
    assert row({"role": "attention_shard", "hop": HOP | never}).endswith("100 us each")


def head(**more: Any) -> str:
    return render(state({"role": "controller"}) | more).splitlines()[0]


def test_a_generation_that_is_whole_needs_no_words() -> None:
    copies = {"slots": 32, "fewest": 2, "fewest_living": 2, "experts_lost": 0}
    assert head(copies=None) == "model m   generation 1"
    assert head(copies=copies) == "model m   generation 1, at least 2 of 2 copies of each expert"


def test_what_a_lost_group_costs_is_said() -> None:
    copies = {"slots": 32, "fewest": 1, "fewest_living": 0, "experts_lost": 24}
    assert head(copies=copies, is_complete=False, is_covered=False).endswith(
        "at least 0 of 1 copies of each expert (24 experts are nowhere: their requests wait)"
        "  (an expert group is missing)"
    )
    assert head(is_complete=False, is_covered=True).endswith(
        "(an expert group is missing; the others have its experts)"
    )
