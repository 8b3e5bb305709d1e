"""What the step benchmark's records say."""

from __future__ import annotations

from step import Run, records_of

SLOW, FAST, SPLIT = "monolithic, 1 thread", "monolithic, 2 threads", "1x1"
RUNS = {
    SLOW: [Run(80.0, {}), Run(70.0, {}), Run(75.0, {})],
    FAST: [Run(100.0, {}), Run(50.0, {}), Run(200.0, {})],
    SPLIT: [Run(90.0, {"wait": 3.0}), Run(45.0, {"wait": 9.0}), Run(180.0, {"wait": 5.0})],
}


def test_the_faster_monolithic_engine_is_what_a_split_is_compared_with() -> None:
    by_topology = {each["topology"]: each for each in records_of("m", 8, RUNS)}
    assert {each["baseline"] for each in by_topology.values()} == {FAST}
    assert by_topology[SPLIT]["monolithic_ms"] == by_topology[FAST]["ms"] == 80.0
    assert by_topology[FAST]["throughput_ratio"] == 1.0


def test_throughput_is_compared_pair_by_pair() -> None:
    split = next(each for each in records_of("m", 8, RUNS) if each["topology"] == SPLIT)
    assert split["throughput_ratio"] == split["throughput_ratio_min"] == split["throughput_ratio_max"] == 0.9


def test_a_record_has_the_keys_that_tools_read() -> None:
    split = next(each for each in records_of("m", 8, RUNS) if each["topology"] == SPLIT)
    assert {"model", "topology", "batch", "ms", "monolithic_ms", "throughput_ratio", "stages"} <= split.keys()
    assert split["stages"] == {"wait": 5.0}
    assert split["ms"] == 88.89  # 8 tokens at 90 a second
