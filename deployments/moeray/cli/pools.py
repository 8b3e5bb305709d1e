"""The pools of a living cluster: which processes serve, and what changes among them."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

from moeray.cli.connection import cluster_state
from moeray.cli.progress import news

ROLES = {"experts": "expert_group", "attention": "attention_shard", "ingress": "ingress", "engram": "engram_server"}
"""What is typed -> role of the processes."""
POLL_S = 0.2
CALL_S = 30.0  # for what the controller or Ray Serve is asked


def processes(state: Mapping[str, Any], role: str) -> list[dict[str, Any]]:
    """Of this role, lost ones left out."""
    return [each for each in state["processes"] if each["role"] == role and each["state"] != "lost"]


def serves(state: Mapping[str, Any], role: str, count: int) -> bool:
    """Whether so many processes serve, no other one is on its way, and everybody has the newest generation."""
    if [each["state"] for each in processes(state, role)] != ["ready"] * count:
        return False
    if role == "expert_group" and len(state["groups"]) != count:
        return False
    is_settled = state["proposed"] is None and state["oldest_generation"] == state["generation"]
    return bool(state["is_complete"]) and is_settled


def watch(done: Callable[[dict[str, Any]], bool], timeout_s: float, before: dict[str, Any]) -> dict[str, Any]:
    """Show what happens until it is done or time is up; the last state."""
    started = time.monotonic()
    shown: dict[str, str] = {}
    news(before, shown)  # what is there already is no news
    while True:
        state = cluster_state()
        elapsed_s = time.monotonic() - started
        for line in news(state, shown):
            print(f"[{elapsed_s:5.1f} s] {line}", flush=True)
        if done(state) or elapsed_s > timeout_s:
            return state
        time.sleep(POLL_S)
