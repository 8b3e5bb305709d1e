"""`moeray down`: stop what `up` started, and nothing else."""

from __future__ import annotations

import contextlib
import os
import signal
import time

from moeray.cli import state_file
from moeray.cli.connection import NOT_RUNNING, cluster_state, ray_connection
from moeray.cli.errors import CommandError

SUPERVISOR_STOP_S = 45.0
"""Beside `ingress.drain_s`."""
RETIRE_S = 10.0


def down() -> int:
    """Embedded: end the supervisor and with it Ray. On foreign Ray: delete our application and controller."""
    if os.environ.get("RAY_ADDRESS"):
        with ray_connection():
            cluster_state()
            remove_application()
    elif (cluster := state_file.read()) is None:
        raise CommandError(NOT_RUNNING)
    else:
        _stop_supervisor(cluster)
    print("moeray: stopped")
    return 0


def remove_application() -> None:
    """Delete our Serve application and the controller from the connected Ray cluster."""
    import ray
    from ray import serve

    from moeray.app import APP_NAME
    from moeray.controller.actor import controller

    with contextlib.suppress(Exception):  # Serve raises bare exceptions when it or the application is not there
        serve.delete(APP_NAME)
    with contextlib.suppress(ValueError):
        actor = controller()
        with contextlib.suppress(ray.exceptions.RayError):
            ray.get(actor.retire.remote(), timeout=RETIRE_S)
        ray.kill(actor, no_restart=True)


def _stop_supervisor(cluster: state_file.RunningCluster) -> None:
    os.kill(cluster.supervisor_pid, signal.SIGTERM)
    stop_s = SUPERVISOR_STOP_S + cluster.drain_s
    deadline = time.monotonic() + stop_s
    while cluster.is_alive:
        if time.monotonic() > deadline:
            os.kill(cluster.supervisor_pid, signal.SIGKILL)
            raise CommandError(
                f"the supervisor (pid {cluster.supervisor_pid}) did not stop within {stop_s:g} s "
                f"and was killed; its log: {state_file.log_path()}"
            )
        time.sleep(0.05)
    state_file.remove()
