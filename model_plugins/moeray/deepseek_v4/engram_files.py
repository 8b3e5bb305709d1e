"""Where a checkpoint's Engram tables lie."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import accumulate
from types import SimpleNamespace

from moeray.deepseek_v4.checkpoint import Checkpoint
from moeray.deepseek_v4.engram import EngramLayout
from moeray.deepseek_v4.engram_table import dtype_of_rows, table_name
from moeray.deepseek_v4.weight_files import StoredTensor
from moeray.engram import FileRange, RowFile, TableFiles, TableSet


def table_ranges(tensors: Mapping[str, StoredTensor]) -> Iterator[FileRange]:
    """Where a checkpoint's tables lie, scales included.

    Args:
        tensors: name -> place, as in `Checkpoint.tensors`.
    """
    for name, tensor in tensors.items():
        if ".engram.embed." in name:
            yield FileRange(tensor.file, tensor.offset, tensor.num_bytes)


def engram_layout(checkpoint: Checkpoint) -> EngramLayout | None:
    """Of its config.json; None where the model has no Engram.

    Raises:
        EngramError: see `EngramLayout.from_config`.
    """
    return EngramLayout.from_config(SimpleNamespace(**checkpoint.config))


def engram_tables(checkpoint: Checkpoint, layout: EngramLayout) -> TableSet:
    """The rows of every Engram layer in the checkpoint's files, cut by hash column.

    Raises:
        CheckpointError: a table is missing, or is not one that a layer could gather from (see `dtype_of_rows`).
    """
    tables = []
    for index, layer_id in enumerate(layout.layer_ids):
        stored = checkpoint.matrix(table_name(layer_id))
        dtype_of_rows(stored, (layout.num_rows[index], layout.head_dim))
        starts = tuple(accumulate(layout.primes[index], initial=0))
        scales = None if stored.scale is None else _rows(stored.scale)
        tables.append(TableFiles(stored.weight.name, _rows(stored.weight), scales, starts))
    return TableSet(checkpoint.fingerprint(), tuple(tables))


def _rows(stored: StoredTensor) -> RowFile:
    return RowFile(stored.file, stored.offset, stored.num_bytes // stored.shape[0])
