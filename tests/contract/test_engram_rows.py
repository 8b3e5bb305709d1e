"""One contract for every placement of Engram tables: the file's bytes, for any rows that a step may ask for."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack

import numpy as np
import pytest
import redis_server
from redis_server import RedisServer
from row_peers import bytes_in_file, bytes_of, require_step, row_cluster, rows_of_step, write_tables
from transport_peers import certificate

from moeray.engram import EngramRows, LocalTables, PatientRows, Table, TableSet
from moeray.engram.redis_pages import RedisPages
from moeray.engram.redis_rows import RedisRows


@pytest.fixture(scope="module")
def tables(tmp_path_factory: pytest.TempPathFactory) -> TableSet:
    return write_tables(tmp_path_factory.mktemp("tables"))


SERVED = ["one server", "two servers", "three servers, two copies", "tls", "patient"]
REDIS = ["redis, a row per key", "redis, 64 rows per key", "redis, filled from the file"]


@pytest.fixture(scope="module", params=["host", *SERVED, *REDIS])
def rows(request: pytest.FixtureRequest, tables: TableSet) -> Iterator[EngramRows]:
    if request.param == "host":
        yield LocalTables(
            [
                Table(each.values.mapped(0, each.num_rows), each.scales and each.scales.mapped(0, each.num_rows))
                for each in tables.tables
            ]
        )
        return
    if request.param in REDIS:
        if redis_server.missing():
            pytest.skip(str(redis_server.missing()))
        yield from rows_in_redis(request.param, tables, request.getfixturevalue("tmp_path_factory"))
        return
    num_servers, copies = {"one server": (1, 1), "three servers, two copies": (3, 2)}.get(request.param, (2, 1))
    with ExitStack() as stack:
        tls = certificate() if request.param == "tls" else None
        served = stack.enter_context(row_cluster(tables, num_servers, copies, tls=tls)).client()
        found = PatientRows(served, 10) if request.param == "patient" else served
        stack.callback(found.close)
        yield found


def rows_in_redis(kind: str, tables: TableSet, folders: pytest.TempPathFactory) -> Iterator[EngramRows]:
    server = RedisServer(folders.mktemp("redis"))
    server.start()
    try:
        pages = RedisPages(server.url, None, tables, rows_per_key=1 if kind == REDIS[0] else 64, timeout_s=5)
        if kind != REDIS[2]:
            pages.fill(lambda _done, _total: None)
        # Room for a tenth of the rows: most steps find some of theirs, and none all.
        rows = RedisRows(pages, hot_bytes=40_000, has_file=kind == REDIS[2])
        yield rows
        rows.close()
    finally:
        server.kill()


@pytest.mark.parametrize("num_tokens", [1, 2, 7, 64, 500])
def test_rows_are_the_files_bytes(tables: TableSet, rows: EngramRows, num_tokens: int) -> None:
    for seed in range(5):
        require_step(tables, rows, num_tokens, seed)


def test_a_step_without_tokens_has_no_rows(tables: TableSet, rows: EngramRows) -> None:
    asked = rows.ask(rows_of_step(tables, 0, 0))
    for layer in range(2):
        assert asked.take(layer).index_TC.shape == (0, tables.num_columns)
    require_step(tables, rows, 3, 0)


def test_first_and_last_row_of_every_column_are_right(tables: TableSet, rows: EngramRows) -> None:
    starts = np.array([table.column_starts for table in tables.tables])
    rows_LTC = np.stack([starts[:, :-1], starts[:, 1:] - 1], axis=1)
    asked = rows.ask(rows_LTC)
    for layer in range(2):
        assert bytes_of(asked.take(layer)) == bytes_in_file(tables, layer, rows_LTC[layer])


def test_tokens_that_are_alike_share_rows(tables: TableSet, rows: EngramRows) -> None:
    rows_LTC = np.repeat(rows_of_step(tables, 1, 3), 50, axis=1)
    asked = rows.ask(rows_LTC)
    for layer in range(2):
        assert bytes_of(asked.take(layer)) == bytes_in_file(tables, layer, rows_LTC[layer])


def test_layers_may_be_taken_in_any_order_and_again(tables: TableSet, rows: EngramRows) -> None:
    rows_LTC = rows_of_step(tables, 20, 4)
    asked = rows.ask(rows_LTC)
    for layer in (1, 0, 1):
        assert bytes_of(asked.take(layer)) == bytes_in_file(tables, layer, rows_LTC[layer])


def test_prefetching_changes_no_row(tables: TableSet, rows: EngramRows) -> None:
    for seed in range(5):
        rows.prefetch(rows_of_step(tables, 100, seed))
        require_step(tables, rows, 10, seed)


def test_closing_twice_is_harmless(tables: TableSet) -> None:
    with row_cluster(tables, 1) as cluster:
        client = cluster.client()
        require_step(tables, client, 2, 0)
        client.close()
        client.close()
