"""`moeray status`: who runs where, and how much work each did."""

from __future__ import annotations

import json
from typing import Any

from moeray.cli.connection import cluster_state, ray_connection

COLUMNS = ("role", "id", "pid", "node", "state", "cores", "work")


def status(*, as_json: bool) -> int:
    with ray_connection():
        state = cluster_state()
    print(json.dumps(state, indent=2) if as_json else render(state))
    return 0


def render(state: dict[str, Any]) -> str:
    """The controller's account as text."""
    endpoints = state["endpoints"] or {"http": "not ready", "grpc": "not ready"}
    rows = [COLUMNS, *(_row(process) for process in state["processes"])]
    widths = [max(len(row[column]) for row in rows) for column in range(len(COLUMNS))]
    table = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    head = f"model {state['model']}   {_generation(state)}"
    odd = [f"not the same model: {difference}" for difference in state["mismatches"]]
    odd += [f"warning: {text}" for text in state["warnings"]]
    odd += [f"autoscaling, {pool}: {wanted['reason']}" for pool, wanted in state.get("autoscaling", {}).items()]
    return "\n".join([head, *odd, f"HTTP  {endpoints['http']}", f"gRPC  {endpoints['grpc']}", "", *table])


def _generation(state: dict[str, Any]) -> str:
    """Which one is in force, which is coming, and how many copies of each expert there are."""
    text = f"generation {state['generation']}"
    if copies := state.get("copies"):
        text += f", at least {copies['fewest_living']} of {copies['fewest']} copies of each expert"
        if copies["experts_lost"]:
            text += f" ({copies['experts_lost']} experts are nowhere: their requests wait)"
    if not state["is_complete"]:
        covered = state.get("is_covered")
        text += "  (an expert group is missing" + ("; the others have its experts)" if covered else ")")
    if proposed := state.get("proposed"):
        waits = len(proposed["waits_for"])
        text += f"  (generation {proposed['generation']} with {len(proposed['groups'])} groups is being prepared: "
        text += f"{waits} of them load experts)"
    return text


def _row(process: dict[str, Any]) -> tuple[str, ...]:
    return (
        str(process["role"]),
        str(process["id"]),
        str(process["pid"]),
        str(process["node"])[:8],
        str(process["state"]) + (f" ({process['reason']})" if process.get("reason") else ""),
        _cores(process),
        _work(process),
    )


def _cores(process: dict[str, Any]) -> str:
    """Where its compute threads are pinned, and its relay if that is elsewhere."""
    if not (cores := process.get("cores")):
        return ""
    relay = process.get("relay_core")
    beside = f" relay {relay}" if relay is not None and relay not in cores else ""
    numa_node = process["numa_node"]
    return f"{','.join(map(str, cores))}{beside} (numa {'several' if numa_node is None else numa_node})"


def _work(process: dict[str, Any]) -> str:
    if experts := process.get("experts"):
        copies = f" ({experts['num_copies']} copies)" if experts["num_copies"] else ""
        held = f"{experts['num_experts']} experts{copies} x {experts['num_layers']} layers"
        return f"{held}, {experts['routed_tokens']} routed tokens"
    if rows := process.get("engram"):
        return f"{len(rows['columns'])} hash columns x {rows['tables']} tables, {rows['rows_sent']} rows sent"
    if hop := process.get("hop"):
        return f"{hop['calls']} layer calls, {us_per_call(hop):.0f} us each" + _halves(hop) + _not_split(process)
    return _not_split(process).removeprefix(", ")


def _halves(hop: dict[str, Any]) -> str:
    """Which steps are computed in halves, and what that was measured to save."""
    plan = hop.get("micro_batches") or {}
    tried = ", ".join(
        f"{m['tokens']}: {m['whole_ms']:.0f} -> {m['halves_ms']:.0f} ms" for m in plan.get("measured", ())
    )
    detail = f" ({tried})" if tried else ""
    if plan.get("from_tokens") is not None:
        return f", steps of {plan['from_tokens']}+ tokens in halves{detail}"
    return f", no step in halves{detail}" if tried else ""


def _not_split(process: dict[str, Any]) -> str:
    """Where a shard's experts are, if not in expert groups."""
    where = process.get("experts_in", "expert groups")
    return "" if where == "expert groups" else f", experts in the {where}"


def us_per_call(hop: dict[str, Any]) -> float:
    """Mean time of one layer call, from the start of dispatch to the end of combine, the shared expert included."""
    total_us: float = hop["dispatch_us"] + hop["overlap_us"] + hop["combine_us"]
    return total_us / hop["calls"] if hop["calls"] else 0.0
