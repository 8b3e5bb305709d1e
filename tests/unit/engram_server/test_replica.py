"""A row server's replica beside a stand-in for its member: it serves its columns, and leaves in order."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from types import SimpleNamespace
from typing import Any

import pytest
from row_peers import require_step

from moeray.config import parse_config
from moeray.deepseek_v4.checkpoint import Checkpoint
from moeray.deepseek_v4.engram_files import engram_layout, engram_tables
from moeray.deepseek_v4.source import locate
from moeray.engram import Shares, TableSet
from moeray.engram.served_rows import ServedRows
from moeray.engram_server import replica
from moeray.engram_server.replica import EngramServer
from moeray.membership import MembershipError, Role, View

MODEL = "moeray-tiny"
CONFIG = parse_config({"engram": {"placement": "sharded", "num_servers": 2}})


class Member:
    """In place of `ClusterMember`: notes what it is told, in order."""

    number = 0
    last: Member

    def __init__(self, role: Role, _: object) -> None:
        assert role is Role.ENGRAM_SERVER
        self.told: list[str] = []
        Member.last = self

    async def join(self) -> int:
        self.told.append("join")
        return self.number

    def every(self, _: float, publish: Callable[[], Awaitable[dict[str, Any]]]) -> None:
        self.report = publish

    async def ready(self, address: str) -> None:
        self.told.append("ready")
        self.address = address

    def follow(self, on_view: Callable[[View], Awaitable[None]], on_told_to_go: Callable[[], Awaitable[None]]) -> None:
        self.on_told_to_go = on_told_to_go

    async def drain(self) -> None:
        self.told.append("drain")

    async def leave(self) -> None:
        self.told.append("leave")


class Server(EngramServer):
    def __del__(self) -> None:  # type: ignore[override]
        """Serve awaits it; the garbage collector would not."""


async def started(number: int, monkeypatch: pytest.MonkeyPatch) -> tuple[Server, Member]:
    monkeypatch.setattr(replica, "ClusterMember", Member)
    monkeypatch.setattr(replica, "LEAVE_S", 0.01)
    monkeypatch.setattr(replica.ray.util, "get_node_ip_address", lambda: "127.0.0.1")
    monkeypatch.setattr(Member, "number", number)
    server = Server.__new__(Server)
    await server.__init__(CONFIG, MODEL, SimpleNamespace())  # type: ignore[misc, arg-type]
    return server, Member.last


def tables() -> TableSet:
    checkpoint = Checkpoint.open(locate(MODEL))
    layout = engram_layout(checkpoint)
    assert layout is not None
    return engram_tables(checkpoint, layout)


async def test_two_servers_have_every_row_of_the_file_between_them(monkeypatch: pytest.MonkeyPatch) -> None:
    servers = [await started(number, monkeypatch) for number in range(2)]
    of_file = tables()
    shares = Shares(2, 1, of_file.num_columns)
    addresses = {number: member.address for number, (_, member) in enumerate(servers)}
    served = ServedRows(of_file, shares, addresses, sender="test", timeout_s=30.0, host="127.0.0.1")
    require_step(of_file, served, num_tokens=50, seed=1)
    columns = [(await member.report())["engram"]["columns"] for _, member in servers]
    assert columns == [list(shares.columns(number)) for number in range(2)]
    for server, member in servers:
        assert (await member.report())["engram"]["rows_sent"] > 100
        await server._stop()
        assert member.told == ["join", "ready", "drain", "leave"]


async def test_a_server_that_nobody_asked_for_says_so_and_holds_no_number(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(MembershipError, match="Engram row server 2 is one too many"):
        await started(2, monkeypatch)
    assert Member.last.told == ["join", "leave"]
