"""Every criterion of a run can be missed, alone, and then has a line of its own."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import cast

import pytest
from chaos.criteria import STALLS, Criteria, of_run
from chaos.faults import FAULTS, CannotInject, Context, Kind, LacksMeans, Planned
from chaos.harness import Plan, inject
from chaos.report import Event, Findings
from chaos.run import main

SHARD_KILLS = ("kill engine", "kill shard process", "kill shard replica")
SEQUENTIAL = of_run(FAULTS, every_kind=True, overlap=False)
OVERLAPPING = of_run(FAULTS, every_kind=True, overlap=True)
NO_STALLS = replace(OVERLAPPING, stalls=())


def event(name: str, stall_s: float = 0.1) -> Event:
    return Event(name, 1, recovered_s=1.0, stall_s=stall_s, moved=1, moved_stall_s=stall_s)


def findings() -> Findings:
    """Of a run that misses nothing, by little."""
    events = [event(name) for name in FAULTS]
    events += [event(name) for name in ("kill group", *SHARD_KILLS) for _ in range(2)]
    return Findings(1, events, 200, reprefill_s=0.2)


def stalled(kinds: tuple[str, ...], *stalls_s: float) -> Findings:
    """The same, with these stalls of each of these kinds."""
    good = findings()
    for kind in kinds:
        for each, stall_s in zip((each for each in good.events if each.name == kind), stalls_s, strict=True):
            each.stall_s = each.moved_stall_s = stall_s
            each.moved = int(stall_s > 0)
    return good


def test_a_run_that_meets_every_criterion_misses_none() -> None:
    assert SEQUENTIAL.missed(findings()) == OVERLAPPING.missed(findings()) == []
    assert SEQUENTIAL.kinds == set(FAULTS) and (SEQUENTIAL.min_requests, SEQUENTIAL.min_faults) == (200, 20)


@pytest.mark.parametrize("kind", FAULTS)
def test_a_kind_that_was_not_injected_is_missed_unless_the_machine_lacks_the_means(kind: str) -> None:
    run = findings()
    run.events = [each for each in run.events if each.name != kind] + [Event(kind, 1, skipped="no socket")]
    assert NO_STALLS.missed(run) == [f"every kind: {kind} was not injected: no socket"]
    assert NO_STALLS.excused(run) == []
    run.events[-1].lacks_means = True
    assert NO_STALLS.missed(run) == [] and NO_STALLS.excused(run) == [f"{kind}: no socket"]
    run.events.pop()
    assert len(NO_STALLS.missed(run)) == 1


def test_a_kind_that_was_skipped_once_and_injected_another_time_is_not_missed() -> None:
    run = findings()
    run.events.append(Event("cut channel", 2, skipped="no channel"))
    assert NO_STALLS.missed(run) == [] and NO_STALLS.excused(run) == []


def test_excuses_are_no_faults() -> None:
    run = findings()
    run.events = run.events[:19] + [Event(name, 1, skipped="no", lacks_means=True) for name in list(FAULTS)[19:]]
    assert NO_STALLS.missed(run) == ["faults: 19, at least 20"]


def test_too_few_requests_are_missed() -> None:
    assert OVERLAPPING.missed(replace(findings(), num_requests=199)) == ["requests: 199, at least 200"]


def test_a_failed_and_a_wrong_request_are_missed_each_with_a_line_of_its_own() -> None:
    told = ["wrong: a, during no fault: x", "failed: b, during no fault: y", "failed: c, during no fault: wrong: z"]
    expected = ["failed: 2 requests, none allowed", "wrong: 1 requests, none allowed"]
    assert Criteria().missed(replace(findings(), failures=told)) == expected


def test_a_cluster_that_is_never_whole_again_is_missed() -> None:
    run = findings()
    run.events[3].recovered_s = None
    assert [line.split(":")[0] for line in Criteria().missed(run)] == ["whole again"]


def test_a_run_without_requests_or_faults_misses_the_least_there_is() -> None:
    assert Criteria().missed(Findings(1, [], 0)) == ["requests: 0, at least 1", "faults: 0, at least 1"]


def test_a_group_kills_stall_is_bounded_at_the_median_and_at_worst() -> None:
    assert SEQUENTIAL.missed(stalled(("kill group",), 0.4, 0.5, 2.0)) == []
    assert SEQUENTIAL.missed(stalled(("kill group",), 0.4, 0.6, 2.0)) == [
        "median stall: kill group: 0.60 s, bound 0.50 s"
    ]
    assert SEQUENTIAL.missed(stalled(("kill group",), 0.4, 0.4, 2.1)) == [
        "worst stall: kill group: 2.10 s, bound 2.00 s"
    ]


def test_shard_kills_stalls_are_bounded_at_the_median_of_all_three_kinds_by_the_reprefill_and_half_a_second() -> None:
    assert SEQUENTIAL.missed(stalled(SHARD_KILLS, 0.1, 0.69, 9.0)) == []
    (line,) = SEQUENTIAL.missed(stalled(SHARD_KILLS, 0.1, 0.71, 9.0))
    assert line == f"median stall: {', '.join(SHARD_KILLS)}: 0.71 s, bound 0.70 s"


@pytest.mark.parametrize("kind", ["kill group", *SHARD_KILLS])
def test_three_kills_of_each_kind_must_have_met_a_stream(kind: str) -> None:
    (line,) = SEQUENTIAL.missed(stalled((kind,), 0.1, 0.0, 0.1))
    assert line == f"stall: {kind} met a stream 2 times, at least 3"


def test_a_shard_kill_is_judged_by_the_streams_that_moved() -> None:
    run = findings()
    for each in run.events:
        if each.name in SHARD_KILLS:
            each.stall_s, each.moved_stall_s = 30.0, 0.1
    assert SEQUENTIAL.missed(run) == []
    for each in run.events:
        each.moved = 0
    assert SEQUENTIAL.missed(run) == [f"stall: {kind} met a stream 0 times, at least 3" for kind in SHARD_KILLS]


def test_where_faults_overlap_those_whose_stalls_are_judged_are_alone() -> None:
    judged = ("kill group", *SHARD_KILLS)
    run = stalled(judged, 30.0, 30.0, 30.0)
    assert len(SEQUENTIAL.missed(run)) == len(OVERLAPPING.missed(run)) == 3
    assert OVERLAPPING.alone == SEQUENTIAL.alone == set(judged)
    assert OVERLAPPING.must_move == SEQUENTIAL.must_move == set(SHARD_KILLS)
    assert SEQUENTIAL.repeats == dict.fromkeys(judged, 3)
    assert OVERLAPPING.repeats == {"kill group": 3} | dict.fromkeys(SHARD_KILLS, 1)


def test_a_run_of_some_kinds_is_judged_by_what_it_can_have() -> None:
    some = of_run(["kill group", "cut link"], every_kind=True, overlap=False)
    assert some == Criteria(frozenset({"kill group", "cut link"}), stalls=STALLS[:1])
    assert of_run(FAULTS, every_kind=False, overlap=False) == Criteria()


@pytest.mark.parametrize("error", [LacksMeans("no Redis"), CannotInject("no Redis"), ProcessLookupError()])
def test_only_what_the_machine_lacks_is_an_excuse(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    class Idle:
        def __init__(self) -> None:
            self.state: dict[str, object] = {}

        def listen(self, _: object) -> object:
            return lambda: None

    def fail(_: Context) -> None:
        raise error

    monkeypatch.setitem(cast(dict[str, Kind], FAULTS), "cut link", Kind(fail, frozenset()))  # type: ignore[arg-type]
    context = Context(None, Idle(), None, None, None)  # type: ignore[arg-type]
    done = inject(Planned("cut link", 1, 0.0), context, lambda _: None).event
    assert done.skipped and done.lacks_means == isinstance(error, LacksMeans)


@pytest.mark.parametrize(("options", "status"), [(["--every-kind"], 1), (["--every-kind", "--overlap"], 1), ([], 0)])
def test_a_run_ends_with_an_error_and_a_line_for_what_it_missed(
    options: list[str], status: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    def done(plan: Plan, _: object) -> Findings:
        criteria = of_run(FAULTS, "--every-kind" in options, "--overlap" in options)
        assert (plan.schedule.repeats, plan.alone) == (criteria.repeats, criteria.alone)
        assert plan.must_move == criteria.must_move
        return stalled(("kill group",), 0.1, 0.1, 30.0)

    monkeypatch.setattr("chaos.harness.run", done)
    written = tmp_path / "found.json"
    monkeypatch.setattr("sys.argv", ["run.py", "--json", str(written), *options])
    assert main() == status
    line = "worst stall: kill group: 30.00 s, bound 2.00 s"
    assert (f"MISSED: {line}\n" in capsys.readouterr().out) == bool(status)
    assert json.loads(written.read_text())["missed"] == [line] * status
