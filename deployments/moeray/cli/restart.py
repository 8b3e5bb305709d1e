"""`moeray restart`: one pool's processes anew, one after the other, while the cluster serves.

What a rolling upgrade is here: the new process runs what is installed, and reads the weights that lie there, by then.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from moeray.cli.connection import cluster_state, ray_connection
from moeray.cli.errors import CommandError
from moeray.cli.pools import CALL_S, ROLES, processes, serves, watch
from moeray.cli.serve_targets import Targets


def restart(pool: str, *, timeout_s: float) -> int:
    """Drain, end and replace each process of the pool in turn.

    Args:
        timeout_s: for each of them.
    Raises:
        CommandError: one was not replaced in time (1); the others after it are left as they are.
    """
    role = ROLES[pool]
    with ray_connection():
        state = cluster_state()
        ids = [each["id"] for each in processes(state, role) if each["state"] == "ready"]
        if not ids:
            raise CommandError(f"{pool}: no process of this pool is ready")
        targets = Targets()
        for number, id in enumerate(ids, 1):
            if id not in {each["id"] for each in processes(state, role)}:
                continue  # it has left by itself, or the pool was made smaller
            print(f"{number} of {len(ids)}: {id}", flush=True)
            _tell(id)
            state = watch(lambda now, id=id: is_replaced(now, role, id, targets[pool]), timeout_s, state)  # type: ignore[misc]
            if not is_replaced(state, role, id, targets[pool]):
                raise CommandError(f"{pool}: {id} was not replaced within {timeout_s:g} s (see `moeray status`)")
    print(f"restarted: {len(ids)} {pool}", flush=True)
    return 0


def is_replaced(state: Mapping[str, Any], role: str, id: str, count: int) -> bool:
    """Whether the process is gone and `count` others serve, as many as are wanted by now."""
    return id not in {each["id"] for each in processes(state, role)} and serves(state, role, count)


def _tell(id: str) -> None:
    import ray

    from moeray.controller.actor import controller

    try:
        ray.get(controller().drain.remote(id), timeout=CALL_S)
    except ray.exceptions.RayError as error:
        raise CommandError(f"the controller does not answer: {type(error).__name__}") from error
