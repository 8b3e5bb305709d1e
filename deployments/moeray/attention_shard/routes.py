"""The shard process' end of the route feed (moeray.vllm_hooks.route_feed has the other, and the wire)."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import secrets
import socket
from collections.abc import Callable, Mapping
from typing import Any

from moeray.membership import Charge
from moeray.transport.channel import user_of
from moeray.vllm_hooks.hop import Accuse
from moeray.vllm_hooks.route import Route

logger = logging.getLogger(__name__)

CONNECTED_S = 10.0
MAX_LINE_BYTES = 64 << 20
"""A placement of 100 layers and 1,000 slots is about 1 MB of JSON."""


class RouteRefused(RuntimeError):
    """A worker could not move to the route, or a newer one came; the text says why."""


class RouteServer:
    """Tells every worker of this shard's engine where the experts are. One event loop."""

    def __init__(self, on_accused: Accuse, on_waiting: Callable[[bool], None]) -> None:
        """What workers say beside their answers.

        Args:
            on_accused: `(group_id, reason, charge)`; see `hop.Accuse`.
            on_waiting: when the first worker begins to wait for experts or Engram rows, and when none does any more.
        """
        self._on_accused, self._on_waiting = on_accused, on_waiting
        self._workers: dict[asyncio.StreamWriter, dict[str, Any]] = {}
        self._who_wait: set[asyncio.StreamWriter] = set()
        self._changed = asyncio.Condition()
        self._number = self._num_workers = 0
        self._server: asyncio.AbstractServer | None = None

    async def start(self) -> str:
        """Listen; returns the abstract AF_UNIX name."""
        name = f"moeray-routes-{secrets.token_hex(16)}"
        self._server = await asyncio.start_unix_server(self._hold, path=f"\0{name}", limit=MAX_LINE_BYTES)
        return name

    async def connected(self, num_workers: int) -> None:
        """Wait until they are here.

        Raises:
            TimeoutError: they did not come.
        """
        self._num_workers = num_workers
        async with self._changed:
            await asyncio.wait_for(self._changed.wait_for(lambda: not self._are_missing()), CONNECTED_S)

    async def hung_up(self) -> None:
        """Wait for the first worker that is gone after `connected`: none comes back, so its engine cannot be moved."""
        async with self._changed:
            await self._changed.wait_for(self._are_missing)

    def place_rows(self, row_servers: Mapping[int, str]) -> None:
        """Tell all workers where the Engram row servers are; they dial beside their steps, and say nothing to it."""
        line = json.dumps({"row_servers": dict(row_servers)}).encode() + b"\n"
        for worker in list(self._workers):
            worker.write(line)

    async def publish(self, route: Route) -> None:
        """Tell all workers; returns when each has moved.

        Raises:
            RouteRefused: one of them could not or is gone, or a newer route was published meanwhile.
        """
        self._number += 1
        number = self._number
        line = json.dumps({"number": number, "route": route.to_json()}).encode() + b"\n"
        async with self._changed:
            self._changed.notify_all()  # those who wait for an older one
        for worker in list(self._workers):
            worker.write(line)
        async with self._changed:
            await self._changed.wait_for(
                lambda: (
                    self._number != number
                    or self._are_missing()
                    or all(each.get("number") == number for each in self._workers.values())
                )
            )
        if self._number != number:
            raise RouteRefused("a newer route has come")
        if self._are_missing():
            raise RouteRefused(f"{len(self._workers)} of {self._num_workers} workers follow routes")
        errors = [each["error"] for each in self._workers.values() if "error" in each]
        if errors:
            raise RouteRefused(errors[0])

    def _are_missing(self) -> bool:
        return len(self._workers) < self._num_workers

    async def _hold(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connection: socket.socket = writer.get_extra_info("socket")
        if user_of(connection) != os.geteuid():
            writer.close()
            return
        self._workers[writer] = {}
        await self._notify()
        try:
            while line := await reader.readline():
                message = json.loads(line)
                if "accuse" in message:
                    self._on_accused(message["accuse"], message["reason"], Charge(message["charge"]))
                elif "waiting" in message:
                    self._note_waiting(writer, message["waiting"])
                else:
                    self._workers[writer] = message
                    await self._notify()
        except (OSError, ValueError, KeyError) as error:
            logger.error("route feed: %s", error)
        except asyncio.CancelledError:
            pass  # the process ends; asyncio would report it as an exception that nobody has seen (Python 3.11)
        finally:
            del self._workers[writer]
            self._note_waiting(writer, False)
            with contextlib.suppress(OSError):
                writer.close()
            await self._notify()

    def _note_waiting(self, worker: asyncio.StreamWriter, waits: bool) -> None:
        did_any = bool(self._who_wait)
        if waits:
            self._who_wait.add(worker)
        else:
            self._who_wait.discard(worker)
        if bool(self._who_wait) is not did_any:
            self._on_waiting(not did_any)

    async def _notify(self) -> None:
        async with self._changed:
            self._changed.notify_all()
