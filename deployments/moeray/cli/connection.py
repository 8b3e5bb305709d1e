"""Reaching the Ray cluster and the controller from a command."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from moeray.cli import environment, state_file
from moeray.cli.errors import CommandError

NOT_RUNNING = "no cluster is running here; start one with `moeray up`, or set RAY_ADDRESS to one that is"


@contextmanager
def ray_connection() -> Iterator[None]:
    """Connected to RAY_ADDRESS, or to the cluster that `up` started, while the block runs.

    Raises:
        CommandError: there is none, or it does not answer.
    """
    address = os.environ.get("RAY_ADDRESS")
    if not address:
        cluster = state_file.read()
        if cluster is None:
            raise CommandError(NOT_RUNNING)
        connect(cluster.ray_address, embedded=True)
    else:
        connect(address)
    import ray

    try:
        yield
    finally:
        ray.shutdown()


def connect(address: str, *, embedded: bool = False) -> None:
    """Raises CommandError if no Ray head answers at `address`."""
    environment.prepare(embedded=embedded)
    import ray

    from moeray.controller.settings import NAMESPACE

    try:
        ray.init(address=address, namespace=NAMESPACE, log_to_driver=False, logging_level=logging.ERROR)
    except (ConnectionError, RuntimeError, ValueError) as error:
        first_line = str(error).strip().splitlines()[0]
        raise CommandError(f"Ray at {address} does not answer: {first_line}") from error


def cluster_state(timeout_s: float = 10.0) -> dict[str, Any]:
    """The controller's account of the cluster.

    Raises:
        CommandError: Ray runs, but no moeray cluster in it.
    """
    import ray

    from moeray.controller.actor import controller

    try:
        state: dict[str, Any] = ray.get(controller().state.remote(), timeout=timeout_s)
    except ValueError as error:
        raise CommandError(NOT_RUNNING) from error
    except ray.exceptions.RayError as error:
        raise CommandError(f"the controller does not answer: {type(error).__name__}") from error
    return state


def endpoints() -> tuple[str, str]:
    """(HTTP url, gRPC host:port) of the running cluster, without touching Ray where the state file knows them."""
    cluster = None if os.environ.get("RAY_ADDRESS") else state_file.read()
    if cluster is not None:
        return cluster.http, cluster.grpc
    with ray_connection():
        found = cluster_state()["endpoints"]
    if not found:
        raise CommandError("the cluster has no ingress that is ready yet; see `moeray status`")
    return found["http"], found["grpc"]
