"""Rows found by address are those that the layer gathers from the bundled checkpoint."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import torch

from moeray.deepseek_v4.checkpoint import Checkpoint
from moeray.deepseek_v4.engram import EngramLayout
from moeray.deepseek_v4.engram_files import engram_tables
from moeray.deepseek_v4.engram_table import EngramTable, table_name
from moeray.deepseek_v4.source import locate
from moeray.engram import Shares, StoredRows
from moeray.engram.held_rows import HeldRows


def test_what_row_servers_hold_are_the_rows_of_the_checkpoints_tables() -> None:
    checkpoint = Checkpoint.open(locate("moeray-tiny"))
    layout = EngramLayout.from_config(SimpleNamespace(**checkpoint.config))
    assert layout is not None
    tables = engram_tables(checkpoint, layout)
    assert tables.content == checkpoint.fingerprint()
    assert tables.num_columns == layout.num_columns
    held = HeldRows(tables, Shares(1, 1, layout.num_columns), 0)
    for index, layer_id in enumerate(layout.layer_ids):
        assert tables.tables[index].num_rows == layout.num_rows[index]
        rows = np.unique(np.random.default_rng(index).integers(0, layout.num_rows[index], size=300))
        asked = [rows if each == index else rows[:0] for each in range(len(layout.layer_ids))]
        held.check(asked)
        got = torch.frombuffer(bytearray(b"".join(block.tobytes() for block in held.blocks(asked))), dtype=torch.uint8)
        table = EngramTable(checkpoint.matrix(table_name(layer_id)), (layout.num_rows[index], layout.head_dim))
        assert torch.equal(
            got,
            table.values_of(StoredRows(table.bytes.values, table.bytes.scales, rows[:, None]))
            .contiguous()
            .view(torch.uint8)
            .flatten(),
        )
