"""Attack a real ingress: `python tests/fuzz/run.py --cases 20000`. Prints counts per kind and status; fails on an
answer that is the server's fault, on a secret of another tenant, and on memory or silence beyond the bounds.
"""

# ruff: noqa: E402  the paths first

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

for part in ("cluster", "model_plugins", "deployments", "tests", "tests/integration", "tests/fuzz"):
    sys.path.insert(0, str(Path(__file__).resolve().parents[2] / part))

import grpc
from cases import call, json_bodies, message_bytes, messages, raw_http, send_json, send_raw
from hypothesis import HealthCheck, Phase, given, seed, settings
from target import ATTACKER, Target

from moeray.tiny import checkpoint_path

MAX_GROWTH_BYTES = 512 << 20
MAX_SILENCE_S = 5.0
SHARES = {"json": 0.25, "raw http": 0.25, "grpc message": 0.15, "grpc bytes": 0.35}


def fuzz(target: Target, num_cases: int, seed_: int) -> None:
    """Send about `num_cases`, of each kind its share."""
    connection = target.connection()
    connection.request("GET", "/openapi.json", headers=target.headers)
    answer = connection.getresponse()
    document = json.loads(answer.read())
    assert answer.status == 200, document
    key = target.headers["authorization"].removeprefix("Bearer ")
    with grpc.insecure_channel(target.grpc_address) as channel:
        kinds: dict[str, tuple[Any, Callable[..., None]]] = {
            "json": (json_bodies(document), lambda case: send_json(target, *case)),
            "raw http": (raw_http(key), lambda case: send_raw(target, case)),
            "grpc message": (messages(), lambda case: call(target, channel, "grpc message", *case)),
            "grpc bytes": (message_bytes(), lambda case: call(target, channel, "grpc bytes", *case)),
        }
        for name, (strategy, send) in kinds.items():
            began = time.monotonic()
            many(strategy, send, max(1, round(num_cases * SHARES[name])), seed_)
            print(f"{name}: {time.monotonic() - began:.0f} s", flush=True)


def many(strategy: Any, send: Callable[..., None], num_cases: int, seed_: int) -> None:
    """So many cases; a failing one is made as small as it can be."""

    @seed(seed_)
    @settings(
        max_examples=num_cases, deadline=None, database=None, suppress_health_check=list(HealthCheck),
        phases=(Phase.generate, Phase.shrink), print_blob=False,
    )  # fmt: skip
    @given(strategy)
    def attack(case: Any) -> None:
        send(case)

    attack()


def report(target: Target, before_bytes: int) -> list[str]:
    """Print what happened; what must not have happened."""
    for (kind, status), count in sorted(target.counts.items()):
        print(f"{kind:34} {status:22} {count:7}")
    grown = target.rss_bytes - before_bytes
    print(
        f"cases {sum(target.counts.values())}, memory +{grown >> 20} MiB, "
        f"slowest /health {target.slowest_health_s:.2f} s"
    )
    faults = list(target.lost)
    if grown > MAX_GROWTH_BYTES:
        faults.append(f"memory grew by {grown >> 20} MiB, more than {MAX_GROWTH_BYTES >> 20}")
    if target.slowest_health_s > MAX_SILENCE_S:
        faults.append(f"/health took {target.slowest_health_s:.1f} s, more than {MAX_SILENCE_S:g}")
    return faults


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, Target(checkpoint_path(), Path(folder)) as target:
        try:
            fuzz(target, max(20, arguments.cases // 50), arguments.seed + 1)  # what is allocated once
            before = target.rss_bytes
            fuzz(target, arguments.cases, arguments.seed)
        finally:
            faults = report(target, locals().get("before", target.rss_bytes))
    print("\n".join(faults) or f"clean ({ATTACKER})")
    return 1 if faults else 0


if __name__ == "__main__":
    raise SystemExit(main())
