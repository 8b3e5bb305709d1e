"""One ingress in a process of its own. Arguments: MODEL NAME FOLDER [ROUTING].

With a folder it serves a tenant that it makes. ROUTING is `prefix`, the product's, or `round robin`.

Reads its shards (JSON: name -> address) from stdin, then prints one line of JSON: its ports, and the headers that a
request needs.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
from collections.abc import Iterable
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import uvloop
from doors import ENGINE_ARGS

from moeray.config import parse_config
from moeray.ingress.routing import Candidate
from moeray.ingress.server import IngressServer, IngressSettings
from moeray.ingress.tenants.opening import open_tenants
from moeray.tenancy import Roster, RosterFile
from moeray.tenancy.roster_changes import add_key, create_tenant
from moeray.vllm_hooks.served_model import ExpertsIn

LIMITS = {
    "requests_per_minute": 10**8,
    "tokens_per_minute": 10**10,
    "concurrent_requests": 10**5,
    "tokens_per_month": 10**13,
}
"""All are counted, none is reached."""


async def main(model: str, name: str, folder: str, routing: str = "prefix") -> None:
    said = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # vLLM logs to stdout, where one line alone is read
    front = {"model": model, "model_name": name, "engine_args": ENGINE_ARGS, "experts_in": ExpertsIn.VLLM}
    settings, headers = _tenant(Path(folder), name) if folder else ({}, {})
    server = IngressServer(IngressSettings("bench", front, http_port=0, grpc_port=0, **settings))
    await server.start()
    if routing == "round robin":
        from moeray.ingress import shard_pool

        shard_pool.choose = _in_turn
    shards = json.loads(await asyncio.to_thread(sys.stdin.readline))
    await server.set_shards(shards)
    while sum(each["state"] == "ready" for each in server.describe()["shards"].values()) < len(shards):
        await asyncio.sleep(0.05)
    ports = {"http": server.http_port, "grpc": server.grpc_port}
    print(json.dumps({**ports, "headers": headers}), file=said, flush=True)
    await asyncio.to_thread(sys.stdin.read)  # until who asked is gone
    await server.stop(1.0)


def _in_turn(candidates: Iterable[Candidate]) -> str:
    return min(candidates, key=lambda each: (each.num_served, each.shard)).shard


def _tenant(folder: Path, model: str) -> tuple[dict[str, Any], dict[str, str]]:
    """(settings of an ingress that serves this tenant alone, the headers that say who it is)."""
    roster = RosterFile(folder / "tenants.yaml")
    changed, key = add_key(create_tenant(Roster(), "bench", LIMITS), "bench", now=datetime.now(UTC))
    roster.edit(lambda _: changed)
    config = parse_config(
        {
            "tenants": {
                "auth": "required",
                "file": str(roster.path),
                "secret_file": str(folder / "secret"),
                "usage_dir": str(folder / "usage"),
            }
        }
    )
    return {"tenants": partial(open_tenants, config, model, "bench")}, {"authorization": f"Bearer {key.text}"}


if __name__ == "__main__":
    uvloop.run(main(*sys.argv[1:]))  # the loop that Ray gives an ingress
