"""The Serve replica of an Engram row server: holds its share of the tables, answers every shard that dials in.

It has no request state and may be killed at any instant: who takes its number maps the same rows.
"""

from __future__ import annotations

import asyncio
import os
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import ray

from moeray.config import ClusterConfig
from moeray.controller.member import ClusterMember
from moeray.controller.settings import ControllerSettings
from moeray.health import guard
from moeray.membership import MembershipError, Role, View

if TYPE_CHECKING:
    from moeray.engram.held_rows import HeldRows
    from moeray.engram.row_server import RowServer

REPORT_S = 0.5
LEAVE_S = 1.0
"""From the word that it goes to its end: the shards hear of it meanwhile, and ask another holder, or wait."""


class EngramServer:
    """Serve deployment. Its constructor returns when the rows are in memory and the port listens.

    Shards dial the port; no row passes through this class.
    """

    async def __init__(self, config: ClusterConfig, model: str, settings: ControllerSettings) -> None:  # type: ignore[misc]
        self._held: HeldRows | None = None
        self._server: RowServer | None = None
        self._stage = "starting"
        self._member = ClusterMember(Role.ENGRAM_SERVER, settings)
        number = await self._member.join()
        if number >= config.engram.num_servers:
            await self._member.leave()
            raise MembershipError(f"Engram row server {number} is one too many: its predecessor has not gone yet")
        self._member.every(REPORT_S, self._report)
        host = ray.util.get_node_ip_address()
        self._held, self._server, address = await asyncio.to_thread(self._start, config, model, number, host)
        self._watched = guard(config.health.hang_s)
        self._stage = ""
        await self._member.ready(address)
        self._member.follow(self._on_view, self._go)

    async def check_health(self) -> None:
        """Serve asks this; a server that hangs is killed by its guard, and asked no more by the shards before that."""

    async def __del__(self) -> None:
        """Serve stops this replica."""
        await self._stop()

    async def _go(self) -> None:
        """This process is told to end, although its number is wanted: Serve starts another."""
        try:
            await self._stop()
        finally:
            os._exit(0)

    async def _stop(self) -> None:
        """Leave in order: shards that have another holder of these rows go there first."""
        if self._server is not None:
            await self._member.drain()
            await asyncio.sleep(LEAVE_S)
            await asyncio.to_thread(self._server.stop)
        with suppress(ray.exceptions.RayError, MembershipError):
            await self._member.leave()

    async def _on_view(self, view: View) -> None:
        """Nothing: whatever changes, the rows stay the same."""

    def _start(self, config: ClusterConfig, model: str, number: int, host: str) -> tuple[HeldRows, RowServer, str]:
        from moeray.engram_server.share import hold_share, serve  # imports torch: seconds

        held = hold_share(config, model, number, self._set_stage)
        server, address = serve(held, config, host)
        return held, server, address

    def _set_stage(self, stage: str) -> None:
        self._stage = stage

    async def _report(self) -> dict[str, Any]:
        if self._held is None or self._server is None:
            return {"stage": self._stage}
        shares = self._held.shares
        columns = [column for share in shares.held_by(self._held.server) for column in shares.columns(share)]
        return {
            "engram": {
                "checkpoint": self._held.tables.content,
                "tables": len(self._held.tables.tables),
                "columns": columns,
                "bytes": self._held.num_bytes,
                "rows_sent": self._server.rows_sent,
            },
        }
