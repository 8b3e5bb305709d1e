"""Whose fault it was, and what counts as one."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from chaos.asks import Ask
from chaos.clients import Outcome
from chaos.harness import moved_requests
from chaos.load import what_is_wrong
from chaos.report import Event, Findings, as_text, attribute, fill, first_chunk_s, long_gaps, rows

STREAM = Ask("streamed", "http", {"stream": True}, flows=True)
WHOLE = Ask("whole", "http", {})


def event(name: str, began: float, ended: float, *, cuts_clients: bool = False) -> Event:
    return Event(
        name, 1, began=began, injected=began, ended=ended, cuts_clients=cuts_clients, recovered_s=ended - began
    )


def outcome(
    started: float,
    ended: float,
    *times: float,
    answer: str | None = "right",
    cuts: tuple[float, ...] = (),
    id: str = "",
) -> Outcome:
    """A stream's first chunk comes in no time, or there is one gap more."""
    return Outcome(STREAM if times else WHOLE, started, ended, list(times), answer, cuts=list(cuts), request_id=id)


def never_wrong(_: Outcome) -> str:
    return ""


def test_a_stall_is_charged_to_every_fault_that_it_meets_and_to_none_otherwise() -> None:
    one, other = event("a", 10, 12), event("b", 20, 21)
    done = [outcome(9, 14, 9.5, 13.0, 13.1), outcome(30, 32, 30.5, 31.5), outcome(1, 40)]
    failures, quiet_s = attribute([one, other], done, never_wrong, first_chunk_s=0.5)
    assert (failures, one.stall_s, other.stall_s, quiet_s) == ([], 3.5, 0.0, 1.0)


def test_a_first_chunk_is_late_by_what_is_more_than_usual() -> None:
    one = event("a", 10, 12)
    attribute([one], [outcome(9, 14, 13.0, 13.1)], never_wrong, first_chunk_s=0.5)
    assert one.stall_s == 3.5
    early = event("a", 10, 12)
    attribute([early], [outcome(9, 14, 9.25, 9.5)], never_wrong, first_chunk_s=0.5)
    assert early.stall_s == 0.0


def test_a_stream_that_moved_is_the_faults_that_it_met_and_its_stall_is_kept_apart() -> None:
    one, other = event("a", 10, 12), event("b", 40, 41)
    moved, stayed = outcome(9, 14, 9.0, 10.5, 11.0, id="chaos-1"), outcome(9, 14, 9.0, 12.0, id="chaos-2")
    one.moved_ids = ["chaos-1"]
    attribute([one, other], [moved, stayed], never_wrong)
    assert (one.moved, one.moved_stall_s, one.stall_s) == (1, 1.5, 3.0)
    assert (other.moved, other.moved_stall_s) == (0, 0.0)


def test_what_an_ingress_says_of_a_stream_that_moved_is_found_in_its_log(tmp_path: Path) -> None:
    lines = "other\nchatcmpl-chaos-12-ab12 goes on on s1 after 3 tokens\nchatcmpl-x goes on on s1 after 3 tokens\n"
    (tmp_path / "worker-1.err").write_text(lines)
    (tmp_path / "worker-2.err").write_text("chatcmpl-chaos-watched-7 goes on on s0 after 0 tokens\n")
    assert moved_requests(tmp_path) == {"chaos-12": 1, "chaos-watched-7": 1}


def test_long_gaps_are_kept_with_their_time() -> None:
    assert long_gaps([outcome(9, 14, 9.5, 13.0, 13.5), outcome(0, 3, 1.0, 2.0)], 0.5) == [
        (1.0, 2.0, "streamed"), (9.5, 13.0, "streamed")
    ]  # fmt: skip


def test_a_process_that_is_stopped_knows_it() -> None:
    program = """
import sys, time
from chaos.watching import OwnPauses
pauses = OwnPauses(); pauses.start(); print("up", flush=True)
sys.stdin.readline(); pauses.stop()
print(max(until - since for since, until in pauses.found))
"""
    with subprocess.Popen(
        [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    ) as process:  # fmt: skip
        assert process.stdin is not None and process.stdout is not None
        process.stdout.readline()
        process.send_signal(signal.SIGSTOP)
        time.sleep(1.5)
        process.send_signal(signal.SIGCONT)
        told, _ = process.communicate("\n", timeout=60)
    assert float(told) > 1.0


def test_a_failed_request_is_charged_to_the_latest_fault_it_lived_through() -> None:
    one, other = event("a", 10, 12), event("b", 20, 21)
    failures, _ = attribute([one, other], [outcome(9, 22, answer=None), outcome(30, 31, answer=None)], never_wrong)
    assert (one.failed, other.failed, len(failures)) == (0, 1, 2)
    assert "no fault" in failures[1]


def test_failures_begin_with_what_they_are() -> None:
    one = event("a", 10, 12)
    wrong, _ = attribute([one], [outcome(9, 11)], lambda _: "expected x, got y")
    failed, _ = attribute([one], [outcome(9, 11, answer=None)], never_wrong)
    assert (one.wrong, one.failed) == (1, 1)
    assert [text.split(":")[0] for text in wrong + failed] == ["wrong", "failed"]


def test_the_first_chunk_is_that_of_streams_that_flow() -> None:
    whole, refused = Outcome(WHOLE, 3, 50, [50]), Outcome(STREAM, 3, 4, answer=None)
    asked = [outcome(0, 9, 0.25, 3), outcome(1, 9, 1.5, 2), outcome(2, 9, 2.75), whole, refused]
    assert first_chunk_s(asked) == 0.5
    assert first_chunk_s([outcome(3, 50)]) == 0.0


def test_an_old_fault_excuses_no_later_cut() -> None:
    ingress = event("kill ingress", 10, 12, cuts_clients=True)
    failures, _ = attribute([ingress], [outcome(13, 14, cuts=(13.5,))], never_wrong)
    assert len(failures) == 1


def test_a_cut_is_excused_only_until_its_victim_has_gone() -> None:
    ingress = event("kill ingress", 10, 40, cuts_clients=True)
    ingress.victims_gone = 10.5
    done = [outcome(9, 30, cuts=(when,)) for when in (11.0, 20.0)] + [outcome(9, 30, cuts=(11.0, 20.0))]
    failures, _ = attribute([ingress], done, never_wrong)
    assert (len(failures), ingress.failed, ingress.cut) == (2, 2, 4)


def test_a_late_gap_is_the_repairs() -> None:
    one = event("a", 10, 40)
    attribute([one], [outcome(9, 60, 9.5, 20.0, 31.0, 31.1)], never_wrong)
    assert (one.stall_s, one.repair_stall_s) == (10.5, 11.0)


def test_an_aborted_stream_is_compared_as_far_as_it_goes() -> None:
    def said(content: str) -> str:
        return json.dumps([[[0, {"content": content, "reasoning": ""}]], None])

    ask = Ask("aborted", "http", {"stream": True}, abort_after=2)
    right = {"aborted": Outcome(ask, 0, 1, answer=said("abc"))}
    assert [bool(what_is_wrong(Outcome(ask, 0, 1, answer=said(text)), right)) for text in ("ab", "abcd", "ax", "")] == [
        False, False, True, True,
    ]  # fmt: skip


def test_a_broken_connection_is_excused_only_where_what_it_led_to_was_killed() -> None:
    group, ingress = event("kill group", 10, 12), event("kill ingress", 20, 22, cuts_clients=True)
    failures, _ = attribute(
        [group, ingress], [outcome(9, 11, cuts=(10.5,)), outcome(19, 21, cuts=(20.1, 20.9))], never_wrong
    )
    assert len(failures) == 1 and (group.failed, group.cut, ingress.failed, ingress.cut) == (1, 1, 0, 2)


def test_a_cluster_that_stays_broken_and_a_fault_that_could_not_be_injected_are_shown() -> None:
    broken, skipped = event("a", 1, 2), Event("b", 1, skipped="no channel")
    broken.recovered_s = None
    text = as_text(rows(Findings(1, [broken, skipped], 1)))
    assert "never" in text and "not injected: no channel" in text


def test_the_document_keeps_its_text_around_the_table(tmp_path: Path) -> None:
    document = tmp_path / "faults.md"
    document.write_text("before\n<!-- chaos -->\nold\n<!-- end -->\nafter\n")
    for _ in range(2):
        fill(document, Findings(1, [event("kill group", 1, 2)], 7), {"seed": "1"})
    text = document.read_text()
    assert text.startswith("before\n<!-- chaos -->\nseed 1. 7 requests.") and text.endswith("<!-- end -->\nafter\n")
    assert "old" not in text and text.count("| kill group | 1 |") == 1


def test_an_answer_is_compared_to_the_byte_and_logprobs_within_a_tolerance() -> None:
    right = {"whole": Outcome(WHOLE, 0, 1, answer=json.dumps("abc"), logprobs=[-1.0])}
    assert what_is_wrong(Outcome(WHOLE, 0, 1, answer=json.dumps("abc"), logprobs=[-1.01]), right) == ""
    assert "off by" in what_is_wrong(Outcome(WHOLE, 0, 1, answer=json.dumps("abc"), logprobs=[-1.5]), right)
    assert "expected" in what_is_wrong(Outcome(WHOLE, 0, 1, answer=json.dumps("abcc"), logprobs=[-1.0]), right)
