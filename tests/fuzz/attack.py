"""Several clients at once, each with one kind of case."""

from __future__ import annotations

import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
from cases import (
    batches,
    call,
    goings,
    json_bodies,
    message_bytes,
    messages,
    raw_http,
    send_and_go,
    send_batch,
    send_json,
    send_raw,
    shapes,
)
from hypothesis import HealthCheck, Phase, given, seed, settings
from target import Target

SHARES = {
    "json": 0.3, "raw http": 0.18, "shape": 0.1, "gone": 0.02, "batch": 0.02, "grpc message": 0.2, "grpc bytes": 0.18,
}  # fmt: skip


def attack(target: Target, num_cases: int, seed_: int) -> None:
    """Send about `num_cases`, of each kind its share.

    Raises:
        AssertionError: what a case found.
    """
    connection = target.connection()
    connection.request("GET", "/openapi.json", headers=dict(target.headers))
    answer = connection.getresponse()
    document = json.loads(answer.read())
    connection.close()
    assert answer.status == 200, document
    with grpc.insecure_channel(target.grpc_address) as channel, ThreadPoolExecutor(len(SHARES)) as clients:
        kinds: dict[str, tuple[Any, Callable[..., None]]] = {
            "json": (json_bodies(document), lambda case: send_json(target, *case)),
            "raw http": (raw_http(target.key), lambda case: send_raw(target, case)),
            "shape": (shapes(document, target.key), lambda case: send_raw(target, case, "shape")),
            "gone": (goings(target.key), lambda case: send_and_go(target, *case)),
            "batch": (batches(), lambda case: send_batch(target, *case)),
            "grpc message": (messages(), lambda case: call(target, channel, "grpc message", *case)),
            "grpc bytes": (message_bytes(), lambda case: call(target, channel, "grpc bytes", *case)),
        }
        running = [
            clients.submit(_many, *kinds[name], max(1, round(num_cases * share)), seed_)
            for name, share in SHARES.items()
        ]
    for client in running:
        client.result()


def _many(strategy: Any, send: Callable[..., None], num_cases: int, seed_: int) -> None:
    """So many cases; a failing one is made as small as it can be."""

    @seed(seed_)
    @settings(
        max_examples=num_cases, deadline=None, database=None, suppress_health_check=list(HealthCheck),
        phases=(Phase.generate, Phase.shrink), print_blob=False,
    )  # fmt: skip
    @given(strategy)
    def once(case: Any) -> None:
        send(case)

    once()
