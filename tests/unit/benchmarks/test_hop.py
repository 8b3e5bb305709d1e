"""How the hop benchmark times, and what its records say."""

from __future__ import annotations

from dataclasses import dataclass, field

import hop
import pytest
from contenders import Case
from stages import STAGES, per_call

CASE = Case(batch=2, hidden=8)


@dataclass
class Clockwork:
    """A contender whose calls take as long as they are told, round by round."""

    name: str
    way_us: list[float]
    log: list[str]
    stage: dict[str, float] = field(default_factory=dict)
    round: int = -1

    def begin(self, case: Case, calls: int) -> None:
        self.round += 1
        self.log.append(self.name)

    def call(self) -> int:
        return int(self.way_us[min(self.round, len(self.way_us) - 1)] * 1000)

    def end(self) -> None: ...

    def stages(self) -> dict[str, float]:
        return self.stage

    def close(self) -> None: ...


EFFORT = hop.Effort(rounds=3, round_s=0.0, min_calls=5)


def test_every_round_times_every_contender_in_turn() -> None:
    log: list[str] = []
    hop.rounds_of([Clockwork("a", [1], log), Clockwork("b", [1], log)], CASE, EFFORT)
    assert log == ["a", "b"] * 4  # once to see how long a call takes


def test_the_ratio_is_taken_within_a_round_so_that_common_noise_cancels() -> None:
    log: list[str] = []
    floor, ours = Clockwork("socket", [1, 10, 50, 20], log), Clockwork("channel", [1, 20, 100, 40], log)
    record = hop.record_of("channel", "socket", CASE, hop.rounds_of([floor, ours], CASE, EFFORT))
    assert (record["ratio"], record["ratio_min"], record["ratio_max"]) == (2.0, 2.0, 2.0)
    assert (record["p50_us"], record["floor_us"]) == (40.0, 20.0)


def test_a_record_has_the_keys_that_tools_read() -> None:
    timed = hop.rounds_of([Clockwork("socket", [2], [])], CASE, EFFORT)
    record = hop.record_of("socket", "socket", CASE, timed, link="veth")
    assert {"transport", "batch", "hidden", "p50_us", "p99_us", "floor_us", "ratio"} <= record.keys()
    assert (record["batch"], record["hidden"], record["link"]) == (2, 8, "veth")


def test_a_case_counts_the_bytes_that_any_transport_must_move() -> None:
    x_TD, ids_TK, weights_TK = CASE.call()
    assert CASE.sent_bytes == x_TD.nbytes + ids_TK.nbytes
    assert CASE.received_bytes == ids_TK.numel() * x_TD[0].nbytes
    assert weights_TK.shape == ids_TK.shape


def test_stages_are_of_the_calls_between_two_readings() -> None:
    before = {"calls": 10, **dict.fromkeys(STAGES, 1000)}
    after = {"calls": 12, **dict.fromkeys(STAGES, 5000)}
    assert per_call(before, after) == dict.fromkeys(STAGES, 2.0)
    assert per_call(after, after) == {}


@pytest.mark.full
def test_every_transport_and_floor_is_measured_for_real(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hop, "HIDDENS", (256,))
    monkeypatch.setattr(hop, "BATCHES", (1, 128))
    monkeypatch.setattr(hop, "pin", lambda cores: None)  # the test's own process goes on afterwards
    found = hop.measure(hop.Effort(2, 0.01), gap_us=0.0)
    assert {(each["transport"], each["batch"]) for each in found} == {
        (name, batch) for name in hop.FLOOR_OF for batch in (1, 128)
    }
    for each in found:
        assert each["p50_us"] > 0
        if each["transport"] in hop.TRANSPORTS:
            assert {"pack", "post", "wait", "combine"} == each["stages_us"].keys()
            assert each["p50_us"] < each["call_us"]
