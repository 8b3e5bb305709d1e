"""A member's report, as `moeray status` shows it, as metrics."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import chain
from math import ceil
from typing import Any

from moeray.telemetry import families as f
from moeray.telemetry.families import Family

QUANTILES = (0.5, 0.9, 1.0)
_MICRO = 1e-6
_BLOCKS = ("fetched", "missing", "stored", "dropped")


@dataclass(frozen=True, slots=True)
class Sample:
    """One number; `labels` are the values of its family's labels, in their order."""

    family: Family
    labels: tuple[str, ...]
    value: float


def samples_of(role: str, index: int, report: Mapping[str, Any]) -> Iterator[Sample]:
    """What of a report is a number that goes on. Sections that it lacks (a process that loads has none) are absent."""
    me = (role, str(index))
    serving = report.get("stage", "serving") in ("", "serving")
    yield Sample(f.STAGE, me, float(serving))
    if "hop" in report:
        yield from _shard(me, report)
    if experts := report.get("experts"):
        yield from _group(me, experts)
    if engram := report.get("engram"):
        yield Sample(f.WEIGHT_BYTES, me, engram["bytes"])
        yield Sample(f.ENGRAM_ROWS, me, engram["rows_sent"])


def _shard(me: tuple[str, ...], report: Mapping[str, Any]) -> Iterator[Sample]:
    for state in ("running", "waiting"):
        yield Sample(f.SEQUENCES, (*me, state), report[state])
    if weights := report.get("weights"):
        yield Sample(f.WEIGHT_BYTES, me, weights["bytes"])
    if hop := report["hop"]:
        yield from _hop(me, hop)
    if kv_cache := report.get("kv_cache"):
        yield from _kv_cache(me, kv_cache)


def _hop(me: tuple[str, ...], hop: Mapping[str, Any]) -> Iterator[Sample]:
    for family, key, unit in (
        (f.HOP_CALLS, "calls", 1), (f.HOP_TOKENS, "tokens", 1), (f.HOP_FAILURES, "failures", 1),
        (f.HOP_STALLED, "stalled_us", _MICRO), (f.HOP_LONGEST, "longest_stall_us", _MICRO),
        (f.HOP_GENERATION, "generation", 1), (f.STEPS, "steps", 1), (f.STEP_TOKENS, "step_tokens", 1),
        (f.STEP_SECONDS, "steps_us", _MICRO),
    ):  # fmt: skip
        if key in hop:
            yield Sample(family, me, hop[key] * unit)
    for part in ("dispatch", "overlap", "combine"):
        if f"{part}_us" in hop:
            yield Sample(f.HOP_SECONDS, (*me, part), hop[f"{part}_us"] * _MICRO)
    for stage, spent_us in hop.get("stages", {}).items():
        yield Sample(f.HOP_STAGES, (*me, stage), spent_us * _MICRO)


def _kv_cache(me: tuple[str, ...], kv_cache: Mapping[str, Any]) -> Iterator[Sample]:
    for choice, count in kv_cache.get("choices", {}).items():
        yield Sample(f.KV_CHOICES, (*me, choice), count)
    if "fetched_tokens" in kv_cache:
        yield Sample(f.KV_FETCHED_TOKENS, me, kv_cache["fetched_tokens"])
    for tier, store in kv_cache.get("stores", {}).items():
        counts = {what: store[f"{what}_blocks"] for what in _BLOCKS} | {"given_up": store["given_up"]}
        for what, count in counts.items():
            yield Sample(f.KV_BLOCKS, (*me, tier, what), count)
        yield Sample(f.KV_BYTES, (*me, tier), store["fetched_bytes"])
        yield Sample(f.KV_FAILURES, (*me, tier), store["failures"])
        yield Sample(f.KV_IN_USE, (*me, tier), float(store["in_use"]))


def _group(me: tuple[str, ...], experts: Mapping[str, Any]) -> Iterator[Sample]:
    yield Sample(f.WEIGHT_BYTES, me, experts["bytes"])
    yield Sample(f.EXPERT_COPIES, me, experts["num_copies"])
    yield Sample(f.EXPERT_CALLS, me, experts["calls"])
    yield Sample(f.EXPERT_SECONDS, me, experts["calls_us"] * _MICRO)
    layers: Mapping[Any, list[int]] = experts["tokens_per_layer"]
    for layer, tokens in layers.items():
        yield Sample(f.EXPERT_TOKENS, (*me, str(layer)), sum(tokens))
        yield Sample(f.EXPERT_HOTTEST, (*me, str(layer)), max(tokens, default=0))
    held = experts["held"]  # tokens_per_layer counts by expert of the model, also those that others have
    mine = sorted(chain.from_iterable((layers[layer][expert] for expert in held[layer]) for layer in held))
    for quantile in QUANTILES if mine else ():
        yield Sample(f.EXPERT_QUANTILES, (*me, f"{quantile:g}"), mine[max(0, ceil(quantile * len(mine)) - 1)])
