"""How many processes Ray Serve is to keep of each pool."""

from __future__ import annotations

import time
from typing import Any

from moeray.cli.errors import CommandError

DEPLOYMENTS = {"experts": "ExpertGroup", "attention": "AttentionShard", "ingress": "Ingress", "engram": "EngramServer"}
"""Pool -> its Serve deployment."""
FRESH_S = 2.0


class Targets:
    """The numbers wanted now, at most FRESH_S old: `targets["experts"]`."""

    def __init__(self) -> None:
        self._known: dict[str, Any] = {}
        self._asked_at = float("-inf")

    def __getitem__(self, pool: str) -> int:
        """Raises CommandError: Ray Serve has no such deployment, or is not there."""
        if time.monotonic() - self._asked_at > FRESH_S:
            self._known, self._asked_at = deployments(), time.monotonic()
        name = DEPLOYMENTS[pool]
        if name not in self._known:
            raise CommandError(f"{pool}: Ray Serve has no deployment {name}")
        return int(self._known[name]["target_num_replicas"])


def deployments() -> dict[str, Any]:
    """Ray Serve's own account of our deployments, by name.

    Raises:
        CommandError: Serve does not run, or not this application.
    """
    from moeray.app import APP_NAME

    details = serve_client().get_serve_details()
    application = details["applications"].get(APP_NAME)
    if application is None:
        raise CommandError(f"Ray Serve has no application {APP_NAME}")
    found: dict[str, Any] = application["deployments"]
    return found


def serve_client() -> Any:
    """Raises CommandError: Serve does not run here."""
    from ray.serve.context import _get_global_client
    from ray.serve.exceptions import RayServeException

    try:
        return _get_global_client()
    except RayServeException as error:
        raise CommandError(f"Ray Serve does not run here: {error}") from error
