"""Stages of a layer call, as the transport counts them."""

from __future__ import annotations

from typing import Any

STAGES = {"pack": "pack_ns", "post": "send_ns", "shared": "overlap_ns", "wait": "wait_ns", "combine": "reduce_ns"}


def stage_sums(transport: Any) -> dict[str, int]:
    """Running sums in nanoseconds, and `calls`; empty where the transport keeps no account."""
    timings = transport.timings() if hasattr(transport, "timings") else None
    if timings is None:
        return {}
    return {"calls": timings.calls, **{stage: getattr(timings, name) for stage, name in STAGES.items()}}


def per_call(before: dict[str, int], after: dict[str, int]) -> dict[str, float]:
    """Microseconds per layer call between two `stage_sums`."""
    calls = after.get("calls", 0) - before.get("calls", 0)
    if not calls:
        return {}
    return {stage: round((after[stage] - before.get(stage, 0)) / calls / 1e3, 2) for stage in STAGES}
