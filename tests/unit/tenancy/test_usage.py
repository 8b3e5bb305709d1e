"""Usage records reach their store, whole and once; what cannot be kept is counted and said; sums are right."""

from __future__ import annotations

import errno
import json
import os
import threading
import time
from dataclasses import fields, replace
from datetime import UTC, datetime
from pathlib import Path

import pytest
from redis import Redis
from redis_server import RedisServer, nobody

from moeray.tenancy import (
    UsageFiles,
    UsageRecord,
    UsageStream,
    UsageWriter,
    connect,
    read_stream,
    read_usage,
    summarise,
)
from moeray.tenancy.usage import GROUPINGS, parse_line
from moeray.tenancy.usage_stream import STREAM

NOON = datetime(2026, 11, 22, 12, tzinfo=UTC).timestamp()
DAY = 86400.0
RECORD = UsageRecord(
    time=NOON, request_id="r", tenant="search", key_id="0123456789ab", model="moeray-tiny", protocol="http",
    prompt_tokens=10, completion_tokens=5, cached_tokens=4, queue_s=0.1, ttft_s=0.2, total_s=1.0, outcome="ok",
)  # fmt: skip
WAIT_S = 60.0


class Sink:
    """Keeps lines in memory; fails while it is told to."""

    def __init__(self) -> None:
        self.lines: list[bytes] = []
        self.is_broken = False
        self.tried = threading.Event()

    def write(self, lines: list[bytes]) -> None:
        self.tried.set()
        if self.is_broken:
            raise OSError(errno.ENOSPC, "full")
        self.lines += lines

    def sync(self) -> None: ...

    def close(self) -> None: ...


def until(condition: object) -> None:
    deadline = time.monotonic() + WAIT_S
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_every_record_is_read_back_from_files(tmp_path: Path) -> None:
    writer = UsageWriter(UsageFiles(tmp_path / "usage", "ingress-1", keep_days=9))
    for number in range(2500):
        writer.record(replace(RECORD, request_id=str(number), tenant="größe"))
    writer.close(WAIT_S)
    records = [parse_line(line) for line in read_usage(tmp_path / "usage")]
    assert records == [replace(RECORD, request_id=str(number), tenant="größe") for number in range(2500)]
    assert writer.num_lost == 0


def test_every_record_is_read_back_from_redis(redis: Redis, redis_server: RedisServer) -> None:
    writer = UsageWriter(UsageStream(connect(redis_server.url, None, timeout_s=WAIT_S)))
    for number in range(2500):
        writer.record(replace(RECORD, request_id=str(number)))
    writer.close(WAIT_S)
    assert [parse_line(line) for line in read_stream(redis)] == [
        replace(RECORD, request_id=str(number)) for number in range(2500)
    ]
    assert list(read_stream(redis, since=time.time() + DAY)) == []


def test_the_stream_is_bounded(redis: Redis) -> None:
    stream = UsageStream(redis, max_records=500)
    for _ in range(10):
        stream.write([RECORD.to_line()] * 200)
    assert redis.xlen(STREAM) < 800


def test_a_redis_that_does_not_answer_is_an_oserror() -> None:
    client = connect(nobody(), None, timeout_s=5.0)
    with pytest.raises(OSError, match="redis"):
        UsageStream(client).write([b"{}\n"])
    with pytest.raises(OSError, match="redis"):
        list(read_stream(client))


def test_while_the_store_fails_records_wait_and_what_is_too_much_is_counted_in_the_log_itself() -> None:
    sink = Sink()
    sink.is_broken = True
    writer = UsageWriter(sink, max_waiting=5)
    for number in range(8):
        writer.record(replace(RECORD, request_id=str(number)))
    assert sink.tried.wait(WAIT_S)
    until(lambda: writer.problem is not None)
    assert writer.num_lost == 3
    sink.is_broken = False
    until(lambda: len(sink.lines) == 6)
    writer.close(WAIT_S)
    report = summarise(sink.lines, "tenant")
    assert (report.lost, report.rows["search"].requests, writer.problem) == (3, 5, None)
    assert [json.loads(line)["request_id"] for line in sink.lines[:5]] == list("01234")


def test_records_lost_at_the_end_are_said(caplog: pytest.LogCaptureFixture) -> None:
    sink = Sink()
    sink.is_broken = True
    writer = UsageWriter(sink)
    writer.record(RECORD)
    writer.close(WAIT_S)
    assert writer.num_lost == 1
    assert "1 usage records were lost" in caplog.text


def test_to_record_waits_for_no_store() -> None:
    class Stuck(Sink):
        def write(self, lines: list[bytes]) -> None:
            self.tried.set()
            assert going_on.wait(WAIT_S)
            super().write(lines)

    going_on, sink = threading.Event(), Stuck()
    writer = UsageWriter(sink)
    writer.record(RECORD)
    assert sink.tried.wait(WAIT_S)
    for _ in range(1000):
        writer.record(RECORD)
    assert not sink.lines, "all were taken while the store was stuck"
    going_on.set()
    writer.close(WAIT_S)
    assert len(sink.lines) == 1001


def test_a_write_that_fails_in_the_middle_leaves_nothing_and_is_repeated_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files, write = UsageFiles(tmp_path, "i", keep_days=9), os.write
    files.write([RECORD.to_line()])
    room = [70]

    def full(file: int, data: bytes) -> int:
        if not room[0]:
            raise OSError(errno.ENOSPC, "full")
        written = write(file, data[: room[0]])
        room[0] -= written
        return written

    monkeypatch.setattr("moeray.tenancy.usage_files.os.write", full)
    with pytest.raises(OSError, match="full"):
        files.write([RECORD.to_line()] * 3)
    monkeypatch.undo()
    files.write([RECORD.to_line()] * 3)
    report = summarise(read_usage(tmp_path), "tenant")
    assert (report.rows["search"].requests, report.torn) == (4, 0)


def test_files_turn_by_day_and_size_and_old_ones_go(tmp_path: Path) -> None:
    now = NOON
    files = UsageFiles(tmp_path, "i", keep_days=2, max_bytes=500, clock=lambda: now)
    for _ in range(5):
        for _ in range(4):
            files.write([RECORD.to_line()])
        now += DAY
    names = sorted(path.name for path in tmp_path.iterdir())
    assert {name[6:16] for name in names} == {"2026-11-24", "2026-11-25", "2026-11-26"}
    assert len(names) == 3 * 2
    assert all(path.stat().st_size < 500 + len(RECORD.to_line()) for path in tmp_path.iterdir())
    assert all(path.stat().st_mode & 0o077 == 0 for path in tmp_path.iterdir())


def test_a_process_of_the_same_name_does_not_write_into_its_predecessors_file(tmp_path: Path) -> None:
    for _ in range(2):
        UsageFiles(tmp_path, "i", keep_days=9).write([RECORD.to_line()])
    assert len(list(tmp_path.iterdir())) == 2


def test_only_days_that_matter_are_read(tmp_path: Path) -> None:
    for day in range(3):
        UsageFiles(tmp_path, "i", keep_days=9, clock=lambda day=day: NOON + day * DAY).write([RECORD.to_line()])  # type: ignore[misc]
    assert len(list(read_usage(tmp_path, since=NOON + DAY))) == 2


def test_sums_are_those_of_each_group() -> None:
    lines = [
        RECORD.to_line(),
        replace(RECORD, tenant="chat", key_id="", outcome="aborted", time=NOON + DAY).to_line(),
        replace(RECORD, model="other", prompt_tokens=90).to_line(),
    ]
    sums = {by: {name: row.prompt_tokens for name, row in summarise(lines, by).rows.items()} for by in GROUPINGS}
    assert sums == {
        "tenant": {"chat": 10, "search": 100},
        "model": {"moeray-tiny": 20, "other": 90},
        "key": {"-": 10, "0123456789ab": 100},
        "day": {"2026-11-22": 100, "2026-11-23": 10},
    }
    row = summarise(lines, "tenant").rows["search"]
    assert (row.requests, row.failed, row.completion_tokens, row.cached_tokens, row.total_s) == (2, 0, 10, 8, 2.0)
    assert summarise(lines, "tenant").rows["chat"].failed == 1
    assert set(summarise(lines, "tenant", since=NOON + 1).rows) == {"chat"}
    assert set(summarise(lines, "tenant", until=NOON + DAY).rows) == {"search"}


def test_a_torn_or_foreign_line_is_counted_and_nothing_more() -> None:
    whole = RECORD.to_line()
    foreign = [b"3", b"[]", b'"lost"', b'{"lost": 1}', b'{"lost": 1e999, "time": 0}', b"\xff", b"{}", b"null"]
    report = summarise([whole, whole[:40], *foreign, b"", b"\n", whole], "tenant")
    assert (report.rows["search"].requests, report.torn) == (2, 1 + len(foreign))


def test_a_record_has_no_field_for_what_was_said() -> None:
    assert {each.name for each in fields(UsageRecord)} == {
        "time", "request_id", "tenant", "key_id", "model", "protocol", "prompt_tokens", "completion_tokens",
        "cached_tokens", "queue_s", "ttft_s", "total_s", "outcome",
    }  # fmt: skip
