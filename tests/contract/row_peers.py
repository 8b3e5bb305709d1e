"""Tables in a file, processes that serve them, and a link between client and server that can be made bad."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from transport_peers import Peer

from moeray.config import ClusterTlsConfig
from moeray.engram import Shares, StoredRows, TableSet
from moeray.engram.held_rows import HeldRows
from moeray.engram.row_server import RowServer
from moeray.engram.rows import IntArray
from moeray.engram.served_rows import ServedRows
from moeray.engram.tables import RowFile, TableFiles

VALUE_BYTES, SCALE_BYTES = 256, 8
COLUMNS = ((53, 59, 61, 67, 71, 73), (79, 83, 89, 97, 101, 103))
"""Rows of each hash column of two layers."""
TIMEOUT_S = 2.0


def write_tables(folder: Path, content: str = "one", seed: int = 0) -> TableSet:
    """Random tables; the first layer's rows have scales, and nothing begins at a page."""
    file, generator = folder / f"{content}.bin", np.random.default_rng(seed)
    offset, tables = 13, []
    with file.open("wb") as stream:
        stream.write(bytes(offset))
        for layer, columns in enumerate(COLUMNS):
            starts = tuple(int(each) for each in np.cumsum((0, *columns)))
            parts = []
            for row_bytes in (VALUE_BYTES, SCALE_BYTES)[: 2 - layer]:
                parts.append(RowFile(file, offset, row_bytes))
                offset += stream.write(generator.bytes(starts[-1] * row_bytes))
            scales = parts[1] if len(parts) > 1 else None
            tables.append(TableFiles(f"layers.{layer}.table", parts[0], scales, starts))
    return TableSet(content, tuple(tables))


def rows_of_step(tables: TableSet, num_tokens: int, seed: int) -> IntArray:
    """[L, T, C] random rows, each in its column's range, with many that occur twice."""
    generator = np.random.default_rng(seed)
    layers = []
    for table in tables.tables:
        starts = np.array(table.column_starts)
        layers.append(generator.integers(starts[:-1], starts[1:], size=(num_tokens, len(starts) - 1)))
    return np.stack(layers)


def bytes_of(stored: StoredRows) -> tuple[bytes, bytes]:
    """Values and scales of every (token, column), in order."""
    index = stored.index_TC.ravel()
    scales = b"" if stored.scales is None else stored.scales[index].tobytes()
    return stored.values[index].tobytes(), scales


def bytes_in_file(tables: TableSet, layer: int, rows_TC: IntArray) -> tuple[bytes, bytes]:
    """The same, read from the file and by nothing of ours."""
    table = tables.tables[layer]
    found = []
    for part in (table.values, table.scales):
        if part is None:
            found.append(b"")
            continue
        data = part.file.read_bytes()
        starts = (part.offset + part.row_bytes * int(row) for row in rows_TC.ravel())
        found.append(b"".join(data[start : start + part.row_bytes] for start in starts))
    return found[0], found[1]


def require_step(tables: TableSet, rows: Any, num_tokens: int, seed: int) -> None:
    """Ask for a step's rows; they must be the file's, or this raises."""
    rows_LTC = rows_of_step(tables, num_tokens, seed)
    asked = rows.ask(rows_LTC)
    for layer in range(len(tables.tables)):
        stored = asked.take(layer)
        assert stored.index_TC.shape == rows_LTC[layer].shape
        assert bytes_of(stored) == bytes_in_file(tables, layer, rows_LTC[layer])


@dataclass
class RowProcess:
    """Commands of a row server's process."""

    server: RowServer | None = None

    def serve(self, tables: TableSet, shares: Shares, number: int, port: int, tls: ClusterTlsConfig | None) -> str:
        self.server = RowServer(HeldRows(tables, shares, number), port=port, tls=tls)
        return self.server.start()

    def rows_sent(self) -> int:
        assert self.server is not None
        return self.server.rows_sent


class RowCluster:
    """Row servers, each a process of its own.

    Attributes:
        addresses: of each server; a restarted one is where it was.
    """

    def __init__(self, tables: TableSet, num_servers: int, copies: int, tls: ClusterTlsConfig | None = None) -> None:
        self.tables, self.shares = tables, Shares(num_servers, copies, tables.num_columns)
        self._tls = tls
        self.peers: dict[int, Peer] = {}
        self.addresses: dict[int, str] = {}
        for number in range(num_servers):
            self.start(number)

    def start(self, number: int, tables: TableSet | None = None) -> None:
        """Start one (again); with `tables`, it serves these."""
        peer = self.peers[number] = Peer(RowProcess)
        port = int(self.addresses[number].rpartition(":")[2]) if number in self.addresses else 0
        self.addresses[number] = peer.ask("serve", tables or self.tables, self.shares, number, port, self._tls)

    def client(self, addresses: Mapping[int, str] | None = None, **changes: Any) -> ServedRows:
        options: dict[str, Any] = {"sender": "test", "timeout_s": TIMEOUT_S, "tls": self._tls, **changes}
        return ServedRows(self.tables, self.shares, self.addresses if addresses is None else addresses, **options)

    def end(self) -> None:
        for peer in self.peers.values():
            peer.end()


@contextlib.contextmanager
def row_cluster(tables: TableSet, num_servers: int, copies: int = 1, **options: Any) -> Iterator[RowCluster]:
    cluster = RowCluster(tables, num_servers, copies, **options)
    try:
        yield cluster
    finally:
        cluster.end()


class BadLink:
    """Carries bytes between clients and one server, until it is told to do worse.

    Attributes:
        flip_at: this byte of what the server says from now on is changed; None: none.
        is_mute: what the server says does not arrive.
    """

    def __init__(self, address: str) -> None:
        host, _, port = address.rpartition(":")
        self._server = (host, int(port))
        self.flip_at: int | None = None
        self.flip_request_at: int | None = None
        self.is_mute = False
        self._ends: list[socket.socket] = []
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def cut(self) -> None:
        """End every connection; new ones are carried."""
        ends, self._ends = self._ends, []
        for end in ends:
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self.cut()

    def _accept(self) -> None:
        while True:
            try:
                near = self._listener.accept()[0]
                far = socket.create_connection(self._server, 5)
                far.settimeout(None)
            except OSError:
                return
            self._ends += [near, far]
            for source, target, is_answer in ((near, far, False), (far, near, True)):
                threading.Thread(target=self._carry, args=(source, target, is_answer), daemon=True).start()

    def _carry(self, source: socket.socket, target: socket.socket, is_answer: bool) -> None:
        with contextlib.suppress(OSError):
            while data := bytearray(source.recv(1 << 16)):
                name = "flip_at" if is_answer else "flip_request_at"
                at = getattr(self, name)
                if at is not None and at < len(data):
                    data[at] ^= 1
                    setattr(self, name, None)
                elif at is not None:
                    setattr(self, name, at - len(data))
                if not (is_answer and self.is_mute):
                    target.sendall(data)
        for end in (source, target):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)


def other_tables(tables: TableSet, content: str) -> TableSet:
    """The same files under another checkpoint's name."""
    return replace(tables, content=content)
