"""The cluster's own account of itself, asked ten times a second on the connection that `moeray status` uses."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Collection
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from moeray.cli.connection import cluster_state
from moeray.cli.errors import CommandError

PERIOD_S = 0.1
ASK_S = 5.0
READY = "ready"
PIDS = ("pid", "shard_pid", "engine_pid")


@dataclass(frozen=True)
class Counts:
    """How many ready processes make the cluster whole."""

    shards: int
    groups: int
    ingresses: int


class OwnPauses(threading.Thread):
    """When this process itself, with its clients, did not run. Attributes: found: (from, to), of `time.monotonic`."""

    TICK_S, LONG_S = 0.02, 0.2

    def __init__(self) -> None:
        super().__init__(daemon=True, name="own pauses")
        self.found: list[tuple[float, float]] = []
        self._ended = threading.Event()

    def run(self) -> None:
        before, has_ended = time.monotonic(), False
        while not has_ended:
            has_ended = self._ended.wait(self.TICK_S)
            now = time.monotonic()
            if now - before > self.LONG_S:
                self.found.append((before, now))
            before = now

    def stop(self) -> None:
        self._ended.set()
        self.join()


class Watcher(threading.Thread):
    """Keeps the latest state; needs an open `ray_connection`."""

    def __init__(self) -> None:
        super().__init__(daemon=True, name="watcher")
        self.state: dict[str, Any] = {}
        self._ended = threading.Event()
        self._listeners: list[Callable[[float, dict[str, Any]], None]] = []

    def run(self) -> None:
        while not self._ended.wait(PERIOD_S):
            with suppress(CommandError):
                state = cluster_state(ASK_S)
                now = time.monotonic()
                self.state = state
                for listener in list(self._listeners):
                    listener(now, state)

    def stop(self) -> None:
        self._ended.set()
        self.join(2 * ASK_S)

    def listen(self, listener: Callable[[float, dict[str, Any]], None]) -> Callable[[], None]:
        """Call it with every new state until the returned function is called."""
        self._listeners.append(listener)
        return lambda: self._listeners.remove(listener)

    def processes(self, role: str) -> list[dict[str, Any]]:
        """Ready ones, by index."""
        return ready(self.state, role)

    def wait(self, condition: Callable[[dict[str, Any]], bool], timeout_s: float) -> bool:
        """Whether it came to hold, for a state newer than this call."""
        held = threading.Event()
        forget = self.listen(lambda _, state: held.set() if condition(state) else None)
        try:
            return held.wait(timeout_s)
        finally:
            forget()


def ready(state: dict[str, Any], role: str) -> list[dict[str, Any]]:
    found = [each for each in state.get("processes", ()) if each["role"] == role and each["state"] == READY]
    return sorted(found, key=lambda each: (each.get("index", 0), each["id"]))


ROLE_OF = {"shards": "attention_shard", "groups": "expert_group", "ingresses": "ingress", "controller": "controller"}
"""Pool -> role of its processes."""


def is_whole(
    state: dict[str, Any], counts: Counts, gone: Collection[int] = (), pools: Collection[str] = tuple(ROLE_OF)
) -> bool:
    """Every process of these pools there and ready, none of the pids `gone` among any; one generation, if of groups."""
    there = [each for each in state["processes"] if each["state"] != "lost"]
    pids = {each.get(key) for each in there for key in PIDS}
    if pids & set(gone):
        return False
    if any(len(ready(state, ROLE_OF[pool])) != getattr(counts, pool, 1) for pool in pools):
        return False
    return "groups" not in pools or (
        bool(state["is_complete"])
        and not state.get("proposed")
        and state.get("oldest_generation", state["generation"]) == state["generation"]
    )


def signs(state: dict[str, Any]) -> dict[str, Any]:
    """What changes when the cluster has noticed a fault: who is ready under which pid, the generation, detours."""
    return {
        "ready": sorted(
            (each["role"], each["id"], each["pid"], each.get("shard_pid"), each.get("engine_pid"))
            for each in state.get("processes", ())
            if each["state"] == READY
        ),
        "generation": state.get("generation"),
        "detours": sum(int((each.get("hop") or {}).get("failures") or 0) for each in state.get("processes", ())),
    }
