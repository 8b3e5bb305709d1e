"""Processes of the Engram benchmark: an engine whose rows come now from here, now from there, and its row servers."""

from __future__ import annotations

from typing import Any

from kv_engines import KvEngine

from moeray.config import EngramConfig
from moeray.deepseek_v4 import Checkpoint
from moeray.deepseek_v4.engram_files import engram_layout, engram_tables
from moeray.engram import Shares, TableSet
from moeray.engram.held_rows import HeldRows
from moeray.engram.row_server import RowServer
from moeray.tiny import checkpoint_path
from moeray.vllm_hooks.engram_placement import open_rows
from moeray.vllm_hooks.settings import ShardSettings

NUM_SERVERS = 2
PLACEMENTS = (EngramConfig("host"), EngramConfig("sharded", num_servers=NUM_SERVERS), EngramConfig("device"))
PLAIN = "device"
"""What the others are compared with."""


class RowServers:
    """The bundled model's tables at row servers in one process."""

    def serve(self) -> dict[int, str]:
        """Number -> where it listens."""
        tables = _tables(Checkpoint.open(checkpoint_path()))
        shares = Shares(NUM_SERVERS, 1, tables.num_columns)
        self.servers = [RowServer(HeldRows(tables, shares, number)) for number in range(NUM_SERVERS)]
        return {number: server.start() for number, server in enumerate(self.servers)}


class EngramEngine(KvEngine):
    """One engine for all placements: where two processes lie in memory would differ by more than the tables cost."""

    def open_placements(self, row_servers: dict[int, str]) -> None:
        """Number -> where it listens."""
        self._engine.apply_model(lambda model: self._open(model, row_servers))

    def decode_from(self, placement: str, batch: int, steps: int) -> float:
        """See `KvEngine.decode`."""
        self._step.rows = self._rows[placement]
        return self.decode(batch, steps)

    def _open(self, model: Any, row_servers: dict[int, str]) -> None:
        checkpoint = Checkpoint.open(checkpoint_path())
        layout = engram_layout(checkpoint)
        assert layout is not None
        mapped = [model.model.layers[layer].engram.table.bytes for layer in layout.layer_ids]
        self._step = model._engram
        self._rows: dict[str, Any] = {}
        for each in PLACEMENTS:
            settings = ShardSettings(backend="local", checkpoint=checkpoint_path(), engram=each)
            self._rows[each.placement] = open_rows(settings, checkpoint, layout, mapped)
        self._rows["sharded"].move(row_servers)


def _tables(checkpoint: Checkpoint) -> TableSet:
    layout = engram_layout(checkpoint)
    assert layout is not None
    return engram_tables(checkpoint, layout)
