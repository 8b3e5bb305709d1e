"""The process on the group's core: expert groups with ready rows, and the far ends of the floors."""

from __future__ import annotations

import socket
from dataclasses import dataclass, field
from typing import Any

import torch
from contenders import Case, ReadyRows
from floors import gloo_group, no_delay, receive_into
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from moeray.config import ClusterTlsConfig
from moeray.transport import GroupServer


@dataclass
class Answerer:
    """Commands of the process on the group's core: expert groups, and the far ends of the floors."""

    servers: list[GroupServer] = field(default_factory=list)
    listener: socket.socket | None = None
    stream: socket.socket | None = None
    gloo: Any = None

    def enter(self, node: Any) -> None:
        """Be on that node of a network from now on."""
        node.enter()

    def serve(self, hidden: int, host: str, tls: ClusterTlsConfig | None = None) -> str:
        """An expert group with ready rows; returns its address."""
        server = GroupServer(ReadyRows(hidden), Case(1, hidden).identity, positions={1: 0}, host=host, tls=tls)
        self.servers.append(server)
        return server.start()

    def listen(self, host: str) -> Any:
        """For a floor over a socket: AF_UNIX where `host` is empty. Returns where to connect to."""
        family = socket.AF_INET if host else socket.AF_UNIX
        self.listener = socket.socket(family)
        self.listener.bind((host, 0) if host else b"")  # b"": a free abstract name
        self.listener.listen(1)
        return self.listener.getsockname()

    def accept(self) -> None:
        assert self.listener is not None
        self.stream, _ = self.listener.accept()
        no_delay(self.stream)

    def echo(self, sent_bytes: int, received_bytes: int, calls: int) -> None:
        assert self.stream is not None
        question, answer = memoryview(bytearray(sent_bytes)), bytes(received_bytes)
        for _ in range(calls):
            receive_into(self.stream, question)
            self.stream.sendall(answer)

    def join_gloo(self, store: tuple[str, int], host: str) -> None:
        self.gloo = gloo_group(TCPStore(*store, is_master=False), 1, host)

    def echo_gloo(self, sent_bytes: int, received_bytes: int, calls: int) -> None:
        """The reply and the next receive are started together, as an expert group does it."""
        question = torch.zeros(sent_bytes, dtype=torch.uint8)
        answer = torch.zeros(received_bytes, dtype=torch.uint8)
        received = self.gloo.recv([question], 0, 0)
        for call in range(calls):
            received.wait()
            sent = self.gloo.send([answer], 0, 0)
            if call + 1 < calls:
                received = self.gloo.recv([question], 0, 0)
            sent.wait()
