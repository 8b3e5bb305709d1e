"""`moeray cache`: what the stores of KV blocks hold and what the shards did with them; and emptying the stores."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from moeray.cli.connection import cluster_state, ray_connection
from moeray.cli.errors import CommandError
from moeray.config import KvCacheConfig
from moeray.kv_cache import StoreFailed, open_store

CALL_S = 60.0
OFF = "no shard shares KV blocks: kv_cache.host_bytes is 0 and kv_cache.redis_url is empty, or no shard is ready"
SHARD_COLUMNS = (
    "shard",
    "store",
    "in use",
    "blocks fetched",
    "MiB fetched",
    "missing",
    "given up",
    "stored",
    "dropped",
)


def stats(*, as_json: bool) -> int:
    """Print every store's size and every shard's counts.

    Raises:
        CommandError: nothing is shared, or no cluster answers.
    """
    with ray_connection():
        shards = _shards(cluster_state())
        stores = {name: _ask("usage", store) for name, store in _stores(shards).items()}
    print(json.dumps({"stores": stores, "shards": shards}, indent=2) if as_json else _render(stores, shards))
    return 0


def flush() -> int:
    """Delete this cluster's blocks from every store; what engines hold in memory of their own stays.

    Raises:
        CommandError: a store did not answer (the others are empty), nothing is shared, or no cluster answers.
    """
    with ray_connection():
        stores = _stores(_shards(cluster_state()))
        answers = {name: _ask("flush", store) for name, store in stores.items()}
    for name, answer in answers.items():
        print(f"{name}: " + (answer.get("error") or f"{answer['blocks']} blocks deleted"))
    if any("error" in answer for answer in answers.values()):
        raise CommandError("not every store could be emptied")
    return 0


def _shards(state: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Shard -> {"node": Ray's node id, **`KvTierConnector.report`}."""
    shards = {
        process["id"]: {"node": process["node"], **process["kv_cache"]}
        for process in state["processes"]
        if process.get("kv_cache")
    }
    if not shards:
        raise CommandError(OFF)
    return shards


def _stores(shards: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """One of each place and namespace, with a node from which it can be reached."""
    found: dict[str, dict[str, Any]] = {}
    for shard in shards.values():
        for kind, store in shard["stores"].items():
            at = f" {shard['node'][:8]}" if kind == "node" else ""
            place = {key: store[key] for key in ("where", "namespace", "block_bytes")}
            place |= {"kind": kind, "node": shard["node"], "kv_cache": shard["kv_cache"]}
            found.setdefault(f"{kind}{at}, namespace {store['namespace'][:8]}", place)
    return found


def _ask(method: str, store: Mapping[str, Any]) -> dict[str, Any]:
    """Have the node of a shard ask its store."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    there = NodeAffinitySchedulingStrategy(store["node"], soft=False)
    task = ray.remote(num_cpus=0, scheduling_strategy=there)(_on_node)
    try:
        answer: dict[str, Any] = ray.get(task.remote(method, dict(store)), timeout=CALL_S)
    except ray.exceptions.RayError as error:
        return {"error": f"node {store['node'][:8]} does not answer: {type(error).__name__}"}
    return answer


def _on_node(method: str, store: Mapping[str, Any]) -> dict[str, Any]:
    """Runs on a node that has the store, with the environment of its processes."""
    config = replace(KvCacheConfig(**store["kv_cache"]), timeout_s=CALL_S / 4)
    try:
        opened = open_store(store["kind"], config, store["namespace"], store["block_bytes"])
        try:
            if method == "flush":
                return {"blocks": opened.flush()}
            usage = opened.usage()
            return {
                "where": store["where"],
                "blocks": usage.blocks,
                "bytes": usage.bytes,
                "budget_bytes": usage.budget_bytes,
            }
        finally:
            opened.close()
    except StoreFailed as error:
        return {"error": str(error)}


def _render(stores: Mapping[str, Mapping[str, Any]], shards: Mapping[str, Mapping[str, Any]]) -> str:
    lines = []
    for name, store in stores.items():
        if "error" in store:
            lines.append(f"{name}: {store['error']}")
            continue
        budget = f" of {_mib(store['budget_bytes'])}" if store["budget_bytes"] else ""
        lines.append(f"{name}: {store['blocks']} blocks, {_mib(store['bytes'])}{budget} MiB, at {store['where']}")
    rows = [SHARD_COLUMNS]
    for shard, told in shards.items():
        for kind, counts in told["stores"].items():
            in_use = "yes" if counts["in_use"] else f"no: {counts['reason']}"
            fetched = counts["fetched_blocks"], _mib(counts["fetched_bytes"])
            others = (counts[key] for key in ("missing_blocks", "given_up", "stored_blocks", "dropped_blocks"))
            rows.append((shard, kind, in_use, *map(str, (*fetched, *others))))
    widths = [max(len(row[column]) for row in rows) for column in range(len(SHARD_COLUMNS))]
    lines += [
        "",
        *("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows),
    ]
    for shard, told in shards.items():
        choices = ", ".join(f"{count} {reason}" for reason, count in sorted(told["choices"].items())) or "none yet"
        lines.append(f"{shard}: {told['fetched_tokens']} tokens not computed; prompts: {choices}")
    return "\n".join(lines)


def _mib(num_bytes: int) -> str:
    return f"{num_bytes / 2**20:.0f}"
