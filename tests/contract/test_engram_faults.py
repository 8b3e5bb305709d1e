"""Row servers that die, hang, lie, are cut off or of another checkpoint: the file's rows, or an error in time."""

from __future__ import annotations

import signal
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from row_peers import (
    TIMEOUT_S,
    BadLink,
    RowCluster,
    other_tables,
    require_step,
    row_cluster,
    rows_of_step,
    write_tables,
)
from transport_peers import eventually

from moeray.engram import PatientRows, RowsUnavailable, TableSet
from moeray.engram.served_rows import ServedRows

SLACK_S = 1.0
"""Two cores, and processes of others on them."""


@pytest.fixture(scope="module")
def tables(tmp_path_factory: pytest.TempPathFactory) -> TableSet:
    return write_tables(tmp_path_factory.mktemp("tables"))


@pytest.fixture
def copied(tables: TableSet) -> Iterator[RowCluster]:
    """Three servers, each column on two."""
    with row_cluster(tables, 3, 2) as cluster:
        yield cluster


@pytest.fixture
def single(tables: TableSet) -> Iterator[RowCluster]:
    """Two servers, each column on one."""
    with row_cluster(tables, 2) as cluster:
        yield cluster


def steps(cluster: RowCluster, rows: ServedRows, count: int, first: int = 0) -> None:
    for seed in range(first, first + count):
        require_step(cluster.tables, rows, num_tokens=1 + seed % 40, seed=seed)


def require_unavailable(cluster: RowCluster, rows: ServedRows, *texts: str) -> None:
    began = time.monotonic()
    asked = rows.ask(rows_of_step(cluster.tables, 8, 1))
    with pytest.raises(RowsUnavailable) as caught:
        asked.take(0)
    assert time.monotonic() - began < TIMEOUT_S + SLACK_S
    for text in ("layers.0.table, layers.1.table", *texts):
        assert text in str(caught.value)
    with pytest.raises(RowsUnavailable):
        asked.take(1)


def has_come_back(cluster: RowCluster, rows: ServedRows, server: int) -> bool:
    """Whether that server answers this client again."""
    before = cluster.peers[server].ask("rows_sent")

    def answers() -> bool:
        steps(cluster, rows, 1)
        return bool(cluster.peers[server].ask("rows_sent") > before)

    return eventually(answers, 10)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_rows_stay_the_files_while_a_server_with_a_copy_dies_or_hangs(copied: RowCluster, number: int) -> None:
    rows = copied.client()
    steps(copied, rows, 20)
    timer = threading.Timer(0.05, lambda: copied.peers[1].kill(number))
    timer.start()
    until, seed = time.monotonic() + TIMEOUT_S + SLACK_S, 20
    while time.monotonic() < until:
        steps(copied, rows, 1, seed)
        seed += 1
    timer.join()
    copied.peers[1].end()
    copied.start(1)
    assert has_come_back(copied, rows, 1)
    rows.close()


def test_a_server_that_goes_on_after_a_pause_is_used_again(copied: RowCluster) -> None:
    rows = copied.client()
    steps(copied, rows, 3)
    copied.peers[0].kill(signal.SIGSTOP)
    began = time.monotonic()
    steps(copied, rows, 10)
    assert time.monotonic() - began < TIMEOUT_S + SLACK_S  # it was waited for once
    copied.peers[0].kill(signal.SIGCONT)
    assert has_come_back(copied, rows, 0)
    rows.close()


@pytest.mark.parametrize(("number", "reason"), [(signal.SIGKILL, "onnection"), (signal.SIGSTOP, "no rows within")])
def test_rows_that_nobody_has_are_an_error_that_names_them_and_never_zeros(
    single: RowCluster, number: int, reason: str
) -> None:
    rows = single.client()
    steps(single, rows, 3)
    single.peers[1].kill(number)
    if number == signal.SIGKILL:
        single.peers[1].end()
    require_unavailable(single, rows, "columns 3..5", f"row server 1 at {single.addresses[1]}", reason)
    if number == signal.SIGSTOP:
        single.peers[1].kill(signal.SIGCONT)
    else:
        single.start(1)
    assert has_come_back(single, rows, 1)
    rows.close()


def test_a_cut_connection_costs_no_step(single: RowCluster) -> None:
    link = BadLink(single.addresses[1])
    rows = single.client({**single.addresses, 1: link.address})
    for seed in range(10):
        steps(single, rows, 3, seed)
        link.cut()
    steps(single, rows, 3)
    rows.close()
    link.close()


@pytest.mark.parametrize("at", [0, 5, 12, 17, 24, 300, 2000])
def test_an_answer_that_is_changed_on_the_way_is_asked_for_again(single: RowCluster, at: int) -> None:
    link = BadLink(single.addresses[1])
    rows = single.client({**single.addresses, 1: link.address})
    require_step(single.tables, rows, 40, 0)
    link.flip_at = at
    require_step(single.tables, rows, 40, 1)
    assert link.flip_at is None
    rows.close()
    link.close()


@pytest.mark.parametrize("at", [0, 6, 9, 18, 22, 27, 40, 100])
def test_a_request_that_is_changed_on_the_way_brings_no_other_rows(copied: RowCluster, at: int) -> None:
    link = BadLink(copied.addresses[1])
    rows = copied.client({**copied.addresses, 1: link.address})
    require_step(copied.tables, rows, 40, 0)
    link.flip_request_at = at
    require_step(copied.tables, rows, 40, 1)
    assert link.flip_request_at is None
    rows.close()
    link.close()


def test_a_link_that_lets_nothing_through_is_given_up_in_time(copied: RowCluster) -> None:
    link = BadLink(copied.addresses[2])
    rows = copied.client({**copied.addresses, 2: link.address})
    steps(copied, rows, 3)
    link.is_mute = True
    began = time.monotonic()
    steps(copied, rows, 5)
    assert time.monotonic() - began < TIMEOUT_S + SLACK_S
    rows.close()
    link.close()


def test_a_server_of_another_checkpoint_is_refused_by_name(single: RowCluster) -> None:
    single.peers[1].end()
    single.start(1, other_tables(single.tables, "two"))
    rows = single.client()
    require_unavailable(single, rows, "row server 1", "checkpoint is two there and one here")
    rows.close()


def test_a_server_that_is_another_number_is_refused(single: RowCluster) -> None:
    rows = single.client({0: single.addresses[1], 1: single.addresses[0]})
    require_unavailable(single, rows, "server is 1 there and 0 here")
    rows.close()


def test_who_talks_something_else_is_no_row_server(copied: RowCluster) -> None:
    listener = socket.create_server(("127.0.0.1", 0))

    def talk() -> None:
        while True:
            try:
                connection = listener.accept()[0]
            except OSError:
                return
            connection.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n" * 100)
            connection.close()

    threading.Thread(target=talk, daemon=True).start()
    rows = copied.client({**copied.addresses, 0: f"127.0.0.1:{listener.getsockname()[1]}"})
    steps(copied, rows, 20)
    rows.close()
    listener.shutdown(socket.SHUT_RDWR)
    listener.close()


def test_garbage_does_not_end_a_server(single: RowCluster) -> None:
    host, _, port = single.addresses[0].rpartition(":")
    generator = np.random.default_rng(0)
    for size in (1, 4, 100, 5000):
        with socket.create_connection((host, int(port)), 5) as connection:
            connection.sendall(generator.bytes(size))
    rows = single.client()
    steps(single, rows, 3)
    rows.close()


def test_a_call_waits_for_rows_that_come_back_and_says_that_it_does(single: RowCluster) -> None:
    said: list[bool] = []
    served = single.client(timeout_s=0.3)
    rows = PatientRows(served, 30, said.append)
    require_step(single.tables, rows, 5, 0)
    single.peers[0].kill()
    single.peers[0].end()
    threading.Timer(1.0, lambda: single.start(0)).start()
    require_step(single.tables, rows, 5, 1)
    assert said == [True, False]
    rows.close()


def test_a_call_that_waited_in_vain_fails(single: RowCluster) -> None:
    rows = PatientRows(single.client(timeout_s=0.2), 1.0)
    require_step(single.tables, rows, 5, 0)
    single.peers[0].kill()
    single.peers[0].end()
    began = time.monotonic()
    with pytest.raises(RowsUnavailable, match=r"waited for 1 s"):
        require_step(single.tables, rows, 5, 1)
    assert 0.8 < time.monotonic() - began < 1.2 + SLACK_S
    rows.close()


def test_servers_that_move_are_found_at_their_new_addresses(single: RowCluster) -> None:
    rows = single.client({})
    threading.Timer(0.2, lambda: rows.move(single.addresses)).start()
    steps(single, rows, 3)
    link = BadLink(single.addresses[0])
    rows.move({**single.addresses, 0: link.address})
    before = single.peers[0].ask("rows_sent")
    steps(single, rows, 3)
    assert single.peers[0].ask("rows_sent") > before
    rows.close()
    link.close()


def test_an_answer_that_was_never_taken_does_not_harm_the_next(single: RowCluster) -> None:
    rows = single.client()
    for seed in range(10):
        rows.ask(rows_of_step(single.tables, 30, 100 + seed))
        require_step(single.tables, rows, 3, seed)
    rows.close()


def test_a_large_step_arrives_while_its_layers_wait(tmp_path: Path) -> None:
    tables = write_tables(tmp_path)
    with row_cluster(tables, 2) as cluster:
        rows = cluster.client()
        require_step(tables, rows, 3000, 0)  # every row of the tables: more than the kernel holds
        rows.close()
