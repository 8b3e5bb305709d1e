"""What the routing benchmark's records say."""

from __future__ import annotations

from routing import PREFIX, ROUND_ROBIN, Window, records_of
from tables import routing_table

WINDOWS = {
    PREFIX: [Window([0.2, 0.2], [0.1, 0.1, 0.3], 0.8), Window([0.2], [0.2, 0.2, 0.2], 0.6)],
    ROUND_ROBIN: [Window([0.1, 0.1], [0.2, 0.2, 0.2], 0.5), Window([0.1], [0.25, 0.25, 0.4], 0.5)],
}


def test_routings_are_compared_round_by_round() -> None:
    ours, turns = records_of(WINDOWS)
    assert (ours["ttft_ratio"]["ratio_min"], ours["ttft_ratio"]["ratio_max"]) == (0.5, 0.8)
    assert (ours["ttft_p95_ratio"]["ratio_min"], ours["ttft_p95_ratio"]["ratio_max"]) == (0.5, 1.5)
    assert turns["ttft_ratio"]["ratio"] == turns["ttft_p95_ratio"]["ratio"] == 1.0
    assert (ours["first_ttft_p50_ms"], ours["cached"], ours["requests"]) == (200.0, 0.7, 9)


def test_every_routing_has_its_line() -> None:
    lines = routing_table(records_of(WINDOWS)).splitlines()
    assert [line.split(" | ")[0] for line in lines[2:]] == [f"| {PREFIX}", f"| {ROUND_ROBIN}"]
    assert "0.65 (0.50..0.80)" in lines[2] and "70 %" in lines[2]
