"""A server maps its share and no more, and gives no row that it does not hold."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from moeray.engram import RowFile, Shares, TableFiles, TableSet, prefault
from moeray.engram.held_rows import HeldRows
from moeray.engram.row_wire import WireError

STARTS = (0, 5000, 10007, 15022, 20045)


@pytest.fixture
def tables(tmp_path: Path) -> TableSet:
    values = np.random.default_rng(0).bytes(STARTS[-1] * 24)
    scales = np.random.default_rng(1).bytes(STARTS[-1] * 3)
    file = tmp_path / "tables.bin"
    file.write_bytes(b"x" * 5 + values + scales)
    parts = RowFile(file, 5, 24), RowFile(file, 5 + len(values), 3)
    return TableSet("content", (TableFiles("a", *parts, STARTS), TableFiles("b", parts[0], None, STARTS)))


def test_servers_together_hold_every_byte_as_often_as_there_are_copies(tables: TableSet) -> None:
    for copies in (1, 2, 3):
        held = [HeldRows(tables, Shares(3, copies, 4), server) for server in range(3)]
        assert sum(each.num_bytes for each in held) == copies * STARTS[-1] * (27 + 24)


def test_blocks_are_values_then_scales_of_each_layer(tables: TableSet) -> None:
    held = HeldRows(tables, Shares(2, 1, 4), 1)
    rows = np.arange(STARTS[2], STARTS[4], dtype=np.int64)
    held.check([rows, rows[5:6]])
    got = b"".join(block.tobytes() for block in held.blocks([rows, rows[5:6]]))
    a, b = tables.tables
    assert a.scales is not None
    values, scales = a.values.mapped(0, STARTS[-1]), a.scales.mapped(0, STARTS[-1])
    assert got == values[rows].tobytes() + scales[rows].tobytes() + b.values.mapped(0, STARTS[-1])[rows[5:6]].tobytes()
    assert held.answer_bytes([rows, rows[5:6]]) == len(got)


@pytest.mark.parametrize("rows", [[0], [STARTS[2] - 1], [STARTS[4]], [-1], [STARTS[2], STARTS[4]], [2**62]])
def test_a_row_of_another_server_or_of_nobody_is_refused(tables: TableSet, rows: list[int]) -> None:
    held = HeldRows(tables, Shares(2, 1, 4), 1)
    with pytest.raises(WireError, match="1 rows of a are not held by row server 1"):
        held.check([np.array(rows, dtype=np.int64), np.empty(0, dtype=np.int64)])


@pytest.mark.parametrize("rows", [[STARTS[2] + 1, STARTS[2]], [STARTS[3], STARTS[3]]])
def test_rows_that_do_not_ascend_are_refused(tables: TableSet, rows: list[int]) -> None:
    held = HeldRows(tables, Shares(2, 1, 4), 1)
    with pytest.raises(WireError, match="do not ascend"):
        held.check([np.array(rows, dtype=np.int64), np.empty(0, dtype=np.int64)])


def test_a_file_that_is_too_short_is_found_at_the_start(tables: TableSet) -> None:
    file = tables.tables[0].values.file
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"larger than file size|greater than file size"):
        HeldRows(tables, Shares(2, 1, 4), 1)


def test_what_is_brought_into_memory_is_what_is_held(tables: TableSet) -> None:
    for server in range(3):
        held = HeldRows(tables, Shares(3, 2, 4), server)
        told: list[tuple[int, int]] = []
        prefault(held.ranges(), lambda done, total, told=told: told.append((done, total)))
        assert told[-1] == (held.num_bytes, held.num_bytes)
