"""The tables of docs/performance.md, the targets, and the plots."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import plots
import pytest
import records
import tables
import targets


def hop_record(transport: str, ratio: float, batch: int = 8, **changes: Any) -> records.Record:
    stages = {"pack": 15.0, "post": 5.0, "wait": 40.0, "combine": 30.0}
    return {
        "transport": transport, "batch": batch, "hidden": 256, "p50_us": 45.0, "p99_us": 99.0, "floor_us": 30.0,
        "ratio": ratio, "ratio_min": ratio, "ratio_max": ratio, "floor": "socket", "call_us": 90.0, "stages_us": stages,
        **changes,
    }  # fmt: skip


def step_record(topology: str, ratio: float) -> records.Record:
    return {
        "model": "bench-large", "topology": topology, "batch": 32, "ms": 9.0, "monolithic_ms": 9.0,
        "throughput_ratio": ratio, "throughput_ratio_min": ratio, "throughput_ratio_max": ratio,
        "stages": {"wait": 50.0, "other": 70.0}, "tokens_per_s": 1.0,
    }  # fmt: skip


HOP = [hop_record(name, 1.5) for name in ("local", "socket", "channel", "gloo_p2p", "gloo", "tls")]


def test_only_what_stands_between_the_marks_is_replaced(tmp_path: Path) -> None:
    records.write(tmp_path / "hop.json", HOP)
    text = "before\n<!-- table: hop -->\nold\n<!-- end -->\nafter\n<!-- table: step -->\n<!-- end -->\n"
    filled = tables.filled(text, tmp_path)
    assert filled.startswith("before\n<!-- table: hop -->\n")
    assert "| 256 | 8 |" in filled
    assert "old" not in filled
    assert "\n<!-- end -->\nafter\n" in filled
    assert "`make bench-step`" in filled
    assert tables.filled(filled, tmp_path) == filled


def test_a_table_that_nobody_makes_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(KeyError):
        tables.filled("<!-- table: nonsense -->\n<!-- end -->", tmp_path)


def test_the_documents_tables_are_those_of_the_results() -> None:
    for document in tables.DOCUMENTS:
        text = document.read_text(encoding="utf-8")
        assert tables.filled(text, records.RESULTS) == text


def test_a_missed_target_names_its_largest_stages() -> None:
    met, missed = hop_record("channel", 2.0, batch=1), hop_record("gloo", 3.1, batch=1)
    by_met = {each.met: each for each in targets.verdicts([met, missed], [])}
    assert by_met[True].holds == ""
    assert by_met[False].holds.startswith("wait 40 us, combine 30 us")


def test_large_batches_have_no_target() -> None:
    assert targets.verdicts([hop_record("channel", 9.0, batch=128)], []) == []


def test_packing_and_reduction_have_a_target_of_their_own() -> None:
    slow = hop_record("channel", 1.0, stages_us={"pack": 40.0, "post": 1.0, "wait": 1.0, "combine": 30.0})
    assert [each.met for each in targets.verdicts([slow], [])] == [True, False]


def test_two_shards_are_judged_by_their_better_placement() -> None:
    (found,) = [
        each for each in targets.verdicts([], [step_record("2x1", 1.1), step_record("2x1 shared", 0.7)])
        if "2x1" in each.target
    ]  # fmt: skip
    assert found.met
    assert "2x1 shared" not in found.target


def test_a_plot_has_a_line_for_every_transport(tmp_path: Path) -> None:
    file = tmp_path / "hop.svg"
    plots.hop([*HOP, *(hop_record(each["transport"], 1.5, batch=32, p50_us=500.0) for each in HOP)], file)
    lines = ElementTree.fromstring(file.read_text()).iter("{http://www.w3.org/2000/svg}polyline")
    assert len(list(lines)) == len(HOP)
