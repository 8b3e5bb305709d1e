"""A plan as people, scripts and charts read it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from moeray.planning.memory import RoleMemory
from moeray.planning.plan import Candidate, Plan
from moeray.planning.spec import Task

GIB = float(2**30)
HOST_GIB = 16
"""Of a pod's memory, beside weights and tables: Python, CUDA, staging of KV blocks."""
COLUMNS = (
    "topology", "devices", "replicas", "batch", "cuts", "step ms", "TTFT s", "TPOT ms", "out/s/dev", "cost/M", "input",
    "cached", "output", "bound",
)  # fmt: skip


def text(task: Task, plan: Plan, rows: int) -> str:
    """Memory, the table's first rows (of each kind of topology at least the best), and the verdict."""
    shown = shortened(plan, rows)
    parts = [_head(task), *(_memory(shown[0]) if shown else ()), "", *_table(shown)]
    left = len(plan.candidates) - len(shown)
    if left:
        parts.append(f"({left} more: --rows {len(plan.candidates)} or --json)")
    return "\n".join([*parts, "", plan.verdict])


def shortened(plan: Plan, rows: int) -> list[Candidate]:
    """The first `rows`, and the first of every kind that is not among them, whether it can be taken or not."""
    shown = list(plan.candidates[:rows])
    for candidate in plan.candidates[rows:]:
        if candidate.topology.kind not in {each.topology.kind for each in shown}:
            shown.append(candidate)
    return shown


def as_json(task: Task, plan: Plan) -> dict[str, Any]:
    """All of it; times in the units that the names say."""
    shape = task.shape
    return {
        "model": {
            "name": shape.name, "parameters": shape.parameters, "active_parameters": shape.active_parameters,
            "engram_parameters": shape.engram,
        },
        "best": None if plan.best is None else plan.best.topology.name,
        "verdict": plan.verdict,
        "candidates": [
            {"name": each.topology.name, "served_by_moeray": each.topology.kind != "data", **asdict(each)}
            for each in plan.candidates
        ],
    }  # fmt: skip


def values(task: Task, plan: Plan) -> dict[str, Any]:
    """Values for the chart helm/moeray that serve the best topology: a process, and its devices, for each pod.

    Raises:
        ValueError: there is none.
    """
    if plan.best is None:
        raise ValueError(plan.verdict)
    topology, replicas = plan.best.topology, max(1, plan.best.replicas)
    arguments: dict[str, Any] = {
        "max_model_len": task.workload.prompt + task.workload.output, "max_num_seqs": plan.best.batch,
    }  # fmt: skip
    config: dict[str, Any] = {"attention": {"engine_args": arguments}}
    if topology.kind == "split":
        pods = {"attention": topology.attention * replicas, "experts": topology.groups * replicas}
        if task.attention.name != "CPU":
            config["transport"] = {"backend": "nccl"}
    else:
        pods = {"attention": replicas}
        if topology.tensor > 1:
            arguments |= {"tensor_parallel_size": topology.tensor, "enable_expert_parallel": True}
    groups: dict[str, Any] = {"experts": {"enabled": False}}
    for (pool, number), memory in zip(pods.items(), plan.best.memory, strict=True):
        devices = topology.tensor if pool == "attention" else 1
        groups[pool] = {"replicas": number, "resources": _resources(task, memory, devices)}
    return {"config": config, "workerGroups": groups}


def _resources(task: Task, memory: RoleMemory, devices: int) -> dict[str, Any]:
    """Of a pod: the weights pass through its memory once, n-gram tables stay there."""
    room = f"{math.ceil(HOST_GIB + (devices * memory.weights + memory.host) / GIB)}Gi"
    limits = {"memory": room}
    if task.attention.name != "CPU":
        limits["nvidia.com/gpu"] = str(devices)
    return {"requests": {"cpu": str(4 * devices), "memory": room}, "limits": limits}


def _head(task: Task) -> str:
    shape, workload = task.shape, task.workload
    engram = f", {shape.engram / 1e9:.3g}B in n-gram tables" if shape.engram else ""
    return (
        f"{shape.name}: {_billions(shape.parameters)} parameters, {_billions(shape.active_parameters)} active{engram}; "
        f"{workload.prompt} + {workload.output} tokens, {100 * workload.cached:.0f} % of the prompt cached; "
        f"{task.attention.name} for attention, {task.experts.name} for experts"
    )


def _billions(parameters: int) -> str:
    return f"{parameters / 1e9:.1f}B" if parameters >= 1e8 else f"{parameters / 1e6:.1f}M"


def _memory(candidate: Candidate) -> list[str]:
    """Of the first topology's processes."""
    return [
        f"  {role.role} of {candidate.topology.name}: weights {role.weights / GIB:.1f} GiB, buffers "
        f"{role.buffers / GIB:.1f} GiB"
        + (f", KV {role.kv_per_request / GIB:.3f} GiB per request, {role.requests} fit" if role.kv_per_request else "")
        + (f"; tables {role.host / GIB:.0f} GiB in the node's memory" if role.host else "")
        for role in candidate.memory
    ]


def _table(candidates: Sequence[Candidate]) -> list[str]:
    rows = [COLUMNS, *(_row(each) for each in candidates)]
    widths = [max(len(row[column]) for row in rows if column < len(row)) for column in range(len(COLUMNS))]
    lines = []
    for row in rows:
        cells = [cell.ljust(width) if number == 0 else cell.rjust(width) for number, (cell, width) in
                 enumerate(zip(row, widths, strict=False))]  # fmt: skip
        lines.append("  ".join(cells).rstrip())
    return lines


def _row(candidate: Candidate) -> tuple[str, ...]:
    name, devices = candidate.topology.name, str(candidate.topology.devices)
    if candidate.cost is None or candidate.step is None:
        return (name, devices, "", "", "", "", f"no: {candidate.why_not}")
    step, cost = candidate.step, candidate.cost
    times = (f"{step.total / 1e3:.1f}", f"{candidate.ttft_s:.2f}", f"{1e3 * candidate.tpot_s:.1f}")
    costs = (f"{cost.mean:.3f}", f"{cost.input:.3f}", f"{cost.cached_input:.4f}", f"{cost.output:.3f}")
    size = (str(candidate.replicas), str(candidate.batch), str(step.micro_batches))
    return (name, devices, *size, *times, f"{candidate.output_per_s:.0f}", *costs, step.bound)
