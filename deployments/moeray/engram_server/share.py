"""One server's share of a checkpoint's Engram tables: brought into memory, then served."""

from __future__ import annotations

from collections.abc import Callable

from moeray.config import ClusterConfig, ConfigError
from moeray.deepseek_v4.checkpoint import Checkpoint
from moeray.deepseek_v4.engram_files import engram_layout, engram_tables
from moeray.deepseek_v4.source import locate
from moeray.engram import Shares, prefault
from moeray.engram.held_rows import HeldRows
from moeray.engram.row_server import RowServer


def hold_share(config: ClusterConfig, model: str, number: int, progress: Callable[[str], None]) -> HeldRows:
    """Map the columns of server `number`, and bring them into memory where `engram.prefault` says so. Blocks.

    Raises:
        ConfigError: the model has no Engram.
        CheckpointError: its tables cannot be served.
        OSError: a file cannot be read.
    """
    checkpoint = Checkpoint.open(locate(model))
    layout = engram_layout(checkpoint)
    if layout is None:
        raise ConfigError(f"model: {model} has no Engram tables")
    tables = engram_tables(checkpoint, layout)
    held = HeldRows(tables, Shares(config.engram.num_servers, config.engram.copies, tables.num_columns), number)
    if config.engram.prefault:
        prefault(held.ranges(), lambda done, total: progress(_gib(done, total)))
    return held


def serve(held: HeldRows, config: ClusterConfig, host: str) -> tuple[RowServer, str]:
    """A listening server and its "host:port".

    Raises:
        OSError: nothing can be bound there.
        CertificateError: a file of `cluster_tls` cannot be used.
    """
    server = RowServer(held, host=host, tls=config.cluster_tls)
    return server, server.start()


def _gib(done: int, total: int) -> str:
    return f"bringing Engram rows into memory: {done / 2**30:.2f} of {total / 2**30:.2f} GiB"
