"""`moeray inspect`: what a checkpoint holds, in which formats, and what of it does not fit."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from typing import Any

from moeray.cli.errors import CommandError
from moeray.config import ConfigError
from moeray.deepseek_v4.checkpoint import Checkpoint
from moeray.deepseek_v4.errors import CheckpointError
from moeray.deepseek_v4.inspection import Inspection, inspect
from moeray.deepseek_v4.loading_plan import GroupLoad, plan_loading
from moeray.deepseek_v4.source import locate
from moeray.placement import PlacementError, contiguous
from moeray.vllm_hooks.served_model import describe_model, has_tokenizer, limits

DOES_NOT_FIT = 1


def inspect_checkpoint(model: str, *, groups: int | None, redundant: int, as_json: bool) -> int:
    """Print the report; returns the exit status, 1 if something does not fit.

    Args:
        model: as `model` of cluster.yaml: a bundled name, a directory or a hub id.
        groups: also plan the loading of so many expert groups, with `redundant` extra copies per layer.
    """
    try:
        checkpoint = Checkpoint.read(locate(model))
        found = inspect(checkpoint)
        if not has_tokenizer(checkpoint.path):
            missing = f"{checkpoint.path / 'tokenizer.json'}: is missing; copy it from the model's source"
            found = replace(found, problems=(*found.problems, missing))
        limited = (*limits(describe_model(checkpoint.path)), *(f"on CPU, {each}" for each in found.cpu_problems))
        loads = _plan(checkpoint, groups, redundant) if groups and not found.problems else ()
    except (CheckpointError, ConfigError, PlacementError) as error:
        raise CommandError(str(error), status=2) from error
    print(
        json.dumps(_as_json(found, limited, loads), indent=1) if as_json else "\n".join(_as_text(found, limited, loads))
    )
    return DOES_NOT_FIT if found.problems else 0


def _plan(checkpoint: Checkpoint, groups: int, redundant: int) -> tuple[GroupLoad, ...]:
    shape = checkpoint.shape
    placement = contiguous(
        generation=1,
        num_layers=shape.num_layers,
        num_experts=shape.num_experts,
        num_groups=groups,
        num_redundant=redundant,
    )
    return plan_loading(checkpoint, placement)


def _as_json(found: Inspection, limited: tuple[str, ...], loads: tuple[GroupLoad, ...]) -> dict[str, Any]:
    shape = asdict(found.shape)
    if shape["swiglu_limit"] == float("inf"):
        shape["swiglu_limit"] = None  # JSON has no infinity
    return {
        "path": str(found.path),
        **shape,
        "num_bytes": found.num_bytes,
        "roles": {name: asdict(role) for name, role in found.roles.items()},
        "problems": list(found.problems),
        "limits": list(limited),
        "groups": [asdict(load) for load in loads],
    }


def _as_text(found: Inspection, limited: tuple[str, ...], loads: tuple[GroupLoad, ...]) -> list[str]:
    shape = found.shape
    lines = [
        f"{found.path}",
        f"  {shape.architecture} ({shape.family}): {shape.num_layers} layers, hidden {shape.hidden_size}, "
        f"vocabulary {shape.vocab_size}",
        f"  experts: {shape.num_experts} of width {shape.intermediate_size}, top-{shape.top_k}, "
        f"{shape.num_shared_experts} shared; {len(shape.moe_layers)} MoE layers, {len(shape.hash_layers)} of them "
        f"hash-routed; swiglu limit {shape.swiglu_limit:g}",
        f"  Engram: layers {', '.join(map(str, shape.engram_layers))}" if shape.engram_layers else "  Engram: none",
        "",
        f"  {'role':24}{'tensors':>9}{'values':>12}{'bytes':>12}  formats",
    ]
    for name, role in found.roles.items():
        formats = ", ".join(sorted(role.formats, key=lambda each: -role.formats[each]))
        lines.append(
            f"  {name:24}{role.num_tensors:>9}{_scaled(role.num_values):>12}{_size(role.num_bytes):>12}  {formats}"
        )
    total_values = sum(role.num_values for role in found.roles.values())
    lines.append(f"  {'in all':24}{'':>9}{_scaled(total_values):>12}{_size(found.num_bytes):>12}")
    if loads:
        lines += ["", *_plan_lines(loads)]
    lines += ["", *_verdict(found, limited)]
    return lines


def _plan_lines(loads: tuple[GroupLoad, ...]) -> list[str]:
    smallest, largest = (pick(loads, key=lambda load: load.num_bytes) for pick in (min, max))
    return [
        f"  {len(loads)} expert groups read {_size(smallest.num_bytes)} to {_size(largest.num_bytes)} each "
        f"({smallest.num_experts} to {largest.num_experts} experts, {largest.num_runs} runs of bytes, "
        f"{largest.num_files} files)",
        f"  on CPU such a group holds the values in bfloat16: up to {_size(max(load.value_bytes for load in loads))}",
    ]


def _verdict(found: Inspection, limited: tuple[str, ...]) -> list[str]:
    if found.problems:
        return ["  does not fit:", *(f"    {problem}" for problem in found.problems)]
    return ["  fits, within the limits of this version:" if limited else "  fits", *(f"    {each}" for each in limited)]


def _scaled(number: int) -> str:
    for unit, size in (("T", 10**12), ("B", 10**9), ("M", 10**6), ("k", 10**3)):
        if number >= size:
            return f"{number / size:.1f} {unit}"
    return str(number)


def _size(num_bytes: int) -> str:
    for unit, size in (("TiB", 2**40), ("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if num_bytes >= size:
            return f"{num_bytes / size:.1f} {unit}"
    return f"{num_bytes} B"
