"""What the ingress benchmark's records say, and what it makes of timestamps."""

from __future__ import annotations

from callers import Answer
from door_layers import CLIENT, FROM_ENGINE, Marks, layers
from ingress import BASELINE, BESIDE_RAY, OURS, RAY, Window, records_of, verdicts
from tables import ingress_table, layers_table
from traced import POINTS

WINDOWS = {
    BASELINE: [Window([10.0, 11.0, 12.0], 100.0, {"front": 3.0}), Window([20.0, 21.0, 22.0], 50.0, {"front": 5.0})],
    OURS: [Window([11.0, 12.0, 13.0], 90.0, {"front": 4.0}), Window([23.0, 24.0, 25.0], 60.0, {"front": 4.0})],
}


def test_doors_are_compared_round_by_round() -> None:
    bare, ours = records_of(8, WINDOWS)
    assert (bare["added_ms"], bare["throughput_ratio"]) == (0.0, 1.0)
    assert (ours["added_ms"], ours["added_ms_min"], ours["added_ms_max"]) == (2.0, 1.0, 3.0)
    assert (ours["throughput_ratio_min"], ours["throughput_ratio_max"]) == (0.9, 1.2)
    assert ours["requests"] == 6


def test_every_door_has_its_line() -> None:
    lines = ingress_table(records_of(8, WINDOWS)).splitlines()
    assert [line.split(" | ")[1] for line in lines[2:]] == [BASELINE, OURS]


def test_a_missed_target_is_said() -> None:
    said = verdicts(records_of(8, WINDOWS))
    assert [line.rpartition(", ")[2] for line in said] == ["MISSED", "met"]
    slow = records_of(8, WINDOWS | {RAY: [Window([30.0], 40.0, {"front": 9.0})] * 2})
    slow[1]["door"] += BESIDE_RAY
    assert [line.rpartition(", ")[2] for line in verdicts(slow)] == ["met", "met"]


def marks_of(*times: tuple[str, list[float]]) -> Marks:
    return {name: [] for name, *_ in POINTS} | dict(times)


def test_layers_add_up_to_what_the_client_saw() -> None:
    marks = marks_of(("HTTP in", [1.25]), (FROM_ENGINE, [1.5]), ("SSE", [1.75]))
    found = layers("door", [Answer(began=1.0, first=2.0, tokens=1)], marks)
    assert found["first_token_us"] == {
        "HTTP in": 250_000, FROM_ENGINE: 250_000, "SSE": 250_000, CLIENT: 250_000, "all": 1_000_000,
    }  # fmt: skip
    assert "| SSE | 250000 |" in layers_table([found])


def test_a_step_whose_token_is_not_shown_at_once_tells_nothing_of_the_layers() -> None:
    marks = marks_of(("HTTP in", [1.1]), (FROM_ENGINE, [1.5, 3.0, 4.0, 5.0]), ("SSE", [1.6, 3.25, 5.5]))
    found = layers("door", [Answer(began=1.0, first=2.0, tokens=4)], marks)
    assert found["later_token_us"]["SSE"] == 250_000, "the step at 4 was counted with the event of the one at 5"
