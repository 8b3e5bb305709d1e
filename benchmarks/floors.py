"""Floors: the bytes of one layer call (rows and ids there, one row per pair back) on their way, and nothing else.

socket    AF_UNIX stream, from and into memory that is there already, blocking; one message each way
tcp       the same over TCP, for two nodes
memcpy    the bytes copied once, in one process: no peer, no wake-up
gloo_p2p  Gloo's own send and receive, receives posted before the message comes
"""

from __future__ import annotations

import socket
from datetime import timedelta
from time import perf_counter_ns
from typing import Any

import torch
from contenders import TIMEOUT_S, Case
from pinned import Process
from torch.distributed import ProcessGroupGloo, TCPStore  # type: ignore[attr-defined]


class SocketFloor:
    """`socket` (no host) or `tcp`."""

    def __init__(self, peer: Process, host: str = "", source: str = "") -> None:
        self.name = "tcp" if host else "socket"
        self._peer = peer
        where = peer.ask("listen", host)
        peer.tell("accept")
        self._stream = socket.socket(socket.AF_INET if host else socket.AF_UNIX)
        if source:
            self._stream.bind((source, 0))
        self._stream.connect(where)
        no_delay(self._stream)
        peer.answer()
        self._question, self._answer = b"", memoryview(b"")

    def begin(self, case: Case, calls: int) -> None:
        self._question, self._answer = bytes(case.sent_bytes), memoryview(bytearray(case.received_bytes))
        self._peer.tell("echo", case.sent_bytes, case.received_bytes, calls)

    def call(self) -> int:
        started = perf_counter_ns()
        self._stream.sendall(self._question)
        receive_into(self._stream, self._answer)
        return perf_counter_ns() - started

    def end(self) -> None:
        self._peer.answer()

    def stages(self) -> dict[str, float]:
        return {}

    def close(self) -> None:
        self._stream.close()


class MemcpyFloor:
    name = "memcpy"

    def begin(self, case: Case, calls: int) -> None:
        self._pairs = [
            (torch.empty(size, dtype=torch.uint8), torch.ones(size, dtype=torch.uint8))
            for size in (case.sent_bytes, case.received_bytes)
        ]

    def call(self) -> int:
        started = perf_counter_ns()
        for there, here in self._pairs:
            there.copy_(here)
        return perf_counter_ns() - started

    def end(self) -> None:
        self._pairs = []

    def stages(self) -> dict[str, float]:
        return {}

    def close(self) -> None:
        """Nothing is held."""


class GlooFloor:
    name = "gloo_p2p"

    def __init__(self, peer: Process, host: str, peer_host: str) -> None:
        self._peer = peer
        store = TCPStore(host, 0, is_master=True, wait_for_workers=False)
        peer.tell("join_gloo", (host, store.port), peer_host)
        self._group = gloo_group(store, 0, host)
        peer.answer()

    def begin(self, case: Case, calls: int) -> None:
        self._question = torch.zeros(case.sent_bytes, dtype=torch.uint8)
        self._answer = torch.zeros(case.received_bytes, dtype=torch.uint8)
        self._peer.tell("echo_gloo", case.sent_bytes, case.received_bytes, calls)

    def call(self) -> int:
        started = perf_counter_ns()
        received = self._group.recv([self._answer], 1, 0)
        sent = self._group.send([self._question], 1, 0)
        received.wait()
        sent.wait()
        return perf_counter_ns() - started

    def end(self) -> None:
        self._peer.answer()

    def stages(self) -> dict[str, float]:
        return {}

    def close(self) -> None:
        self._group = None


def gloo_group(store: TCPStore, rank: int, host: str) -> Any:
    options = ProcessGroupGloo._Options()  # type: ignore[attr-defined]
    options._devices = [ProcessGroupGloo.create_device(hostname=host, lazy_init=True)]
    options._timeout = timedelta(seconds=TIMEOUT_S)
    options._threads = 1
    return ProcessGroupGloo(store, rank, 2, options)


def no_delay(stream: socket.socket) -> None:
    if stream.family == socket.AF_INET:
        stream.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)


def receive_into(stream: socket.socket, into: memoryview) -> None:
    while into:
        into = into[stream.recv_into(into) :]
