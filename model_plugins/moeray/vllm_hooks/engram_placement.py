"""Where the rows of a model's Engram layers lie in its checkpoint, as row servers and Redis need to know it."""

from __future__ import annotations

from itertools import accumulate

from moeray.deepseek_v4.checkpoint import Checkpoint
from moeray.deepseek_v4.engram import EngramLayout
from moeray.deepseek_v4.engram_table import EngramTable, table_name
from moeray.deepseek_v4.weight_files import StoredTensor
from moeray.engram import RowFile, TableFiles, TableSet


def engram_tables(checkpoint: Checkpoint, layout: EngramLayout) -> TableSet:
    """The rows of every Engram layer in the checkpoint's files, cut by hash column.

    Raises:
        CheckpointError: a table is missing, or is not one that a layer could gather from (see `EngramTable`).
    """
    tables = []
    for index, layer_id in enumerate(layout.layer_ids):
        stored = checkpoint.matrix(table_name(layer_id))
        EngramTable(stored, (layout.num_rows[index], layout.head_dim))  # for its checks
        starts = tuple(accumulate(layout.primes[index], initial=0))
        scales = None if stored.scale is None else _rows(stored.scale)
        tables.append(TableFiles(stored.weight.name, _rows(stored.weight), scales, starts))
    return TableSet(checkpoint.fingerprint(), tuple(tables))


def _rows(stored: StoredTensor) -> RowFile:
    return RowFile(stored.file, stored.offset, stored.num_bytes // stored.shape[0])
