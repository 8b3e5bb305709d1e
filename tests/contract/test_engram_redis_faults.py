"""A Redis that dies, hangs, is flushed, locked or damaged: the file's rows where it is at hand, else a typed error."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import redis_server
from redis import Redis
from redis_server import RedisServer, something_else
from row_peers import other_tables, require_step, rows_of_step, write_tables
from transport_peers import eventually

from moeray.engram import RowsUnavailable, TableSet
from moeray.engram.redis_pages import RedisPages
from moeray.engram.redis_rows import RedisRows

pytestmark = pytest.mark.skipif(redis_server.missing() is not None, reason=str(redis_server.missing()))

TIMEOUT_S, SLACK_S = 0.5, 1.0
HOT_BYTES = 40_000


@pytest.fixture(scope="module")
def tables(tmp_path_factory: pytest.TempPathFactory) -> TableSet:
    return write_tables(tmp_path_factory.mktemp("tables"))


@pytest.fixture
def server(tmp_path: Path) -> Iterator[RedisServer]:
    server = RedisServer(tmp_path)
    server.start()
    yield server
    server.kill()


def pages_in(server: RedisServer, tables: TableSet, password: str | None = None, filled: bool = True) -> RedisPages:
    pages = RedisPages(server.url, password, tables, rows_per_key=8, timeout_s=TIMEOUT_S)
    if filled:
        pages.fill(lambda _done, _total: None)
    return pages


@pytest.fixture(params=[True, False], ids=["with the file", "without the file"])
def has_file(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


def require_files_rows_or_error(tables: TableSet, rows: RedisRows, has_file: bool, text: str, seed: int = 5) -> None:
    began = time.monotonic()
    if has_file:
        require_step(tables, rows, 40, seed)
    else:
        with pytest.raises(RowsUnavailable) as caught:
            rows.ask(rows_of_step(tables, 40, seed)).take(0)
        assert "layers.0.table" in str(caught.value)
        assert text in str(caught.value)
    assert time.monotonic() - began < 2 * TIMEOUT_S + SLACK_S


@pytest.mark.parametrize(("number", "text"), [(signal.SIGKILL, "onnect"), (signal.SIGSTOP, "imeout")])
def test_a_redis_that_dies_or_hangs_brings_no_other_rows_and_is_used_again(
    tables: TableSet, server: RedisServer, has_file: bool, number: int, text: str
) -> None:
    rows = RedisRows(pages_in(server, tables), hot_bytes=HOT_BYTES, has_file=has_file)
    require_step(tables, rows, 5, 0)
    assert server.process is not None
    os.kill(server.process.pid, number)
    for seed in range(5, 9):
        require_files_rows_or_error(tables, rows, has_file, text, seed)
    server.kill()
    server.start()

    def is_back() -> bool:
        try:
            require_step(tables, rows, 40, 6)
        except RowsUnavailable:
            return False
        commands = Redis.from_url(server.url).info("commandstats")
        return "cmdstat_mget" in commands

    assert eventually(is_back, 20)
    rows.close()


def test_rows_that_were_flushed_are_an_error_or_come_back_from_the_file(
    tables: TableSet, server: RedisServer, has_file: bool
) -> None:
    rows = RedisRows(pages_in(server, tables), hot_bytes=HOT_BYTES, has_file=has_file)
    require_step(tables, rows, 5, 0)
    client = Redis.from_url(server.url)
    client.flushall()
    require_files_rows_or_error(tables, rows, has_file, "does not have them")
    if has_file:
        assert eventually(lambda: client.dbsize() > 0)
    rows.close()


@pytest.mark.parametrize("answer", [b"HTTP/1.1 400 Bad Request\r\n\r\n", b":7\r\n", b"*1\r\n:7\r\n", b"$-7\r\n"])
def test_what_is_no_redis_brings_no_rows(tables: TableSet, has_file: bool, answer: bytes) -> None:
    with something_else(answer, 0.02) as url:
        pages = RedisPages(url, None, tables, rows_per_key=8, timeout_s=TIMEOUT_S)
        rows = RedisRows(pages, hot_bytes=HOT_BYTES, has_file=has_file)
        require_files_rows_or_error(tables, rows, has_file, "Redis at")
        rows.close()


def test_a_wrong_password_is_named(tables: TableSet, server: RedisServer, has_file: bool) -> None:
    Redis.from_url(server.url).config_set("requirepass", "right")
    rows = RedisRows(pages_in(server, tables, "wrong", filled=False), hot_bytes=HOT_BYTES, has_file=has_file)
    require_files_rows_or_error(tables, rows, has_file, "password")
    rows.close()
    rows = RedisRows(pages_in(server, tables, "right"), hot_bytes=HOT_BYTES, has_file=False)
    require_step(tables, rows, 40, 1)
    rows.close()


@pytest.mark.parametrize("damage", ["flip", "cut", "grown", "another type", "of another key"])
def test_a_value_that_is_not_as_it_was_stored_is_not_there(
    tables: TableSet, server: RedisServer, has_file: bool, damage: str
) -> None:
    rows = RedisRows(pages_in(server, tables), hot_bytes=HOT_BYTES, has_file=has_file)
    client = Redis.from_url(server.url)
    stored = {key: client.get(key) for key in client.scan_iter()}
    before = dict(zip(stored, [list(stored.values())[-1], *stored.values()], strict=False))
    for key in stored:
        value = bytearray(before[key] if damage == "of another key" else stored[key])
        if damage != "of another key":
            value[len(value) // 2] ^= 1
        if damage == "another type":
            client.delete(key)
            client.rpush(key, bytes(value))
        else:
            client.set(key, bytes({"flip": value, "cut": value[:-1], "grown": value + b"x"}.get(damage, value)))
    require_files_rows_or_error(tables, rows, has_file, "does not have them")
    rows.close()


def test_another_checkpoints_rows_are_never_taken(tables: TableSet, server: RedisServer) -> None:
    pages_in(server, other_tables(tables, "two"))
    rows = RedisRows(pages_in(server, tables, filled=False), hot_bytes=HOT_BYTES, has_file=False)
    require_files_rows_or_error(tables, rows, False, "does not have them")
    rows.close()


def test_prefetched_rows_are_asked_of_nobody_again(tables: TableSet, server: RedisServer) -> None:
    rows = RedisRows(pages_in(server, tables), hot_bytes=1 << 20, has_file=False)
    rows.prefetch(rows_of_step(tables, 40, 7))
    server.kill()
    require_step(tables, rows, 40, 7)
    rows.close()


def test_filling_tells_how_far_it_is(tables: TableSet, server: RedisServer) -> None:
    told: list[tuple[int, int]] = []
    pages = pages_in(server, tables, filled=False)
    pages.fill(lambda done, total: told.append((done, total)))
    total = sum(table.num_rows for table in tables.tables)
    assert told[-1] == (total, total)
    assert Redis.from_url(server.url).dbsize() == sum(-(-table.num_rows // 8) for table in tables.tables)
    pages.close()
