"""The parent's end of a shard process: start it, follow its events, stop it. Never imports vLLM."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import sys
import time
from collections.abc import Callable

from moeray.attention_shard.spec import Event, ShardSpec, decode_event, encode_spec
from moeray.membership import Charge

STOP_GRACE_S = 12.0


class ShardStartFailed(RuntimeError):
    """The shard process ended before it could serve; carries its reason."""


class ShardProcess:
    """One running shard process. Its standard input is its lifeline: it ends when this process does."""

    def __init__(self, process: asyncio.subprocess.Process, events: asyncio.StreamReader) -> None:
        self._process = process
        self._events = events
        self._ready: Event | None = None
        self._waiting_since: float | None = None

    @classmethod
    async def start(cls, spec: ShardSpec, on_stage: Callable[[str], None]) -> ShardProcess:
        """Returns when the model is loaded and the relay listens.

        Raises:
            ShardStartFailed: with the process' own reason, or its exit status and what it was doing.
        """
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "moeray.attention_shard.process",
            stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE,
        )  # fmt: skip
        if process.stdin is None or process.stdout is None:
            raise ShardStartFailed("the shard process has no pipes")
        process.stdin.write(encode_spec(spec))
        child = cls(process, process.stdout)
        stage = "starting"
        while (event := await child._next_event()) is not None:
            if event.event == "ready":
                child._ready = event
                return child
            if event.event == "failed":
                raise ShardStartFailed(event.text)
            stage = event.text
            on_stage(stage)
        raise ShardStartFailed(f"the shard process ended with status {await process.wait()} while {stage}")

    @property
    def address(self) -> str:
        """The relay's host:port."""
        return f"{self._ready.host}:{self._ready.port}" if self._ready else ""

    @property
    def waits_s(self) -> float:
        """How long a layer call of its engine has waited for experts that nobody has; 0 if none does."""
        return 0.0 if self._waiting_since is None else time.monotonic() - self._waiting_since

    async def ended(self, on_accused: Callable[[str, str, Charge], None]) -> str:
        """Wait for the end of the process; returns why it ended.

        Args:
            on_accused: `(group_id, reason, charge)`, whenever the hop found an expert group bad.
        """
        reason = ""
        while (event := await self._next_event()) is not None:
            if event.event == "accused" and event.charge is not None:
                on_accused(event.group, event.text, event.charge)
            elif event.event in ("waiting", "resumed"):
                self._waiting_since = time.monotonic() if event.event == "waiting" else None
            else:
                reason = event.text or reason
        status = await self._process.wait()
        return reason or f"the shard process ended with status {status}"

    async def stop(self) -> None:
        """Ask it to drain, then insist."""
        if self._process.returncode is None:
            self._process.send_signal(signal.SIGTERM)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._process.wait(), STOP_GRACE_S)
        if self._process.returncode is None:
            self._process.kill()

    async def _next_event(self) -> Event | None:
        line = await self._events.readline()
        return decode_event(line) if line else None
