"""Following a cluster's start: a line for each process that gets further, the reason when one cannot."""

from __future__ import annotations

import time
from typing import Any

from moeray.cli.errors import CommandError
from moeray.config import ClusterConfig

POLL_S = 0.2


def wait_until_ready(config: ClusterConfig, timeout_s: float) -> dict[str, str]:
    """Print progress until every process serves; returns the endpoints.

    Raises:
        CommandError: a process cannot start (with its reason), or timeout_s passed.
    """
    started = time.monotonic()
    shown: dict[str, str] = {}
    while True:
        state = _state()
        elapsed_s = time.monotonic() - started
        for line in news(state, shown):
            print(f"[{elapsed_s:5.1f} s] {line}", flush=True)
        if _is_ready(config, state):
            for text in state["warnings"]:
                print(f"warning: {text}", flush=True)
            endpoints: dict[str, str] = state["endpoints"]
            return endpoints
        _raise_if_failed()
        if elapsed_s > timeout_s:
            waiting = (
                ", ".join(line for line in shown.values() if not line.endswith("ready")) or "no process has joined"
            )
            raise CommandError(f"not ready after {timeout_s:g} s: {waiting}")
        time.sleep(POLL_S)


def _state() -> dict[str, Any]:
    from moeray.cli.connection import cluster_state

    try:
        return cluster_state()
    except CommandError:
        return {
            "processes": [],
            "endpoints": {},
            "is_complete": False,
            "generation": 0,
            "mismatches": [],
            "warnings": [],
        }


def news(state: dict[str, Any], shown: dict[str, str]) -> list[str]:
    lines = []
    for process in state["processes"]:
        stage = process.get("stage") if process["state"] == "starting" else None
        detail = f": {process['reason']}" if process.get("reason") else ""
        line = f"{_name(process)} {stage or process['state']}{detail}"
        if shown.get(process["id"]) != line:
            shown[process["id"]] = line
            lines.append(line)
    for difference in state["mismatches"]:
        line = f"{difference}: members that serve different models form no generation (same files on every node?)"
        if shown.get(difference) != line:
            shown[difference] = line
            lines.append(line)
    if state["generation"] and shown.get("generation") != str(state["generation"]):
        shown["generation"] = str(state["generation"])
        lines.append(f"generation {state['generation']} of the placement formed")
    return lines


def _name(process: dict[str, Any]) -> str:
    role = str(process["role"]).replace("_", " ")
    return f"{role} {process['index']}" if "index" in process else role


def _is_ready(config: ClusterConfig, state: dict[str, Any]) -> bool:
    ready = [process["role"] for process in state["processes"] if process["state"] == "ready"]
    return (
        bool(state["is_complete"])
        and bool(state["endpoints"])
        and ready.count("attention_shard") >= config.attention.num_shards
        and ready.count("engram_server") >= config.engram.num_servers
        and ready.count("ingress") >= config.ingress.num_replicas
    )


def _raise_if_failed() -> None:
    from ray import serve

    from moeray.app import APP_NAME

    application = serve.status().applications.get(APP_NAME)
    if application is not None and application.status in ("DEPLOY_FAILED", "UNHEALTHY"):
        raise CommandError(_reason(application.message, application.deployments))


def _reason(message: str, deployments: dict[str, Any]) -> str:
    """The last line of the innermost traceback: the typed error that a replica raised."""
    texts = [deployment.message for deployment in deployments.values() if deployment.message] or [message]
    lines: list[str] = [line.strip() for line in texts[0].splitlines() if line.strip()]
    errors = [line for line in lines if _names_an_error(line.split(":")[0])]
    return (errors or lines or ["the application failed to start"])[-1]


def _names_an_error(head: str) -> bool:
    """Whether a traceback's line begins with the name of an error; ours are named for what happened."""
    return "Error" in head or "Exception" in head or (head.startswith("moeray.") and " " not in head)
