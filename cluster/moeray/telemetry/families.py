"""Every metric of moeray's own: dashboards, alert rules and docs/metrics.md are checked against this one list.

Labels have few values, whatever clients do: roles, stages, tiers, layers, and at most MAX_TENANTS tenants.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum


class Kind(StrEnum):
    COUNTER = "counter"
    GAUGE = "gauge"
    HISTOGRAM = "histogram"


@dataclass(frozen=True, slots=True)
class Family:
    """One metric.

    Attributes:
        name: as Prometheus shows it; a counter's ends in _total, a histogram has _bucket, _sum and _count of it.
        buckets: upper bounds of a histogram's, without +Inf.
    """

    name: str
    kind: Kind
    help: str
    labels: tuple[str, ...] = ()
    buckets: tuple[float, ...] = ()

    @property
    def series(self) -> tuple[str, ...]:
        """The names by which it can be asked for."""
        if self.kind is Kind.HISTOGRAM:
            return tuple(f"{self.name}_{part}" for part in ("bucket", "sum", "count"))
        return (self.name,)


MAX_TENANTS = 64
"""Tenants with a label of their own, those that were seen first; the others are counted together."""
OTHER_TENANTS = "(others)"
NO_TENANT = ""

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)
_TOKEN_SECONDS = (0.002, 0.005, 0.01, 0.015, 0.02, 0.03, 0.05, 0.075, 0.1, 0.2, 0.5, 1.0, 5.0)
_MEMBER = ("role", "index")


def _counter(name: str, meaning: str, *labels: str) -> Family:
    return Family(name, Kind.COUNTER, meaning, labels)


def _gauge(name: str, meaning: str, *labels: str) -> Family:
    return Family(name, Kind.GAUGE, meaning, labels)


# ---- of requests, by an ingress

REQUESTS = _counter(
    "moeray_requests_total", "Requests that were answered to their end, refused or given up.",
    "model", "tenant", "protocol", "endpoint", "code",
)  # fmt: skip
REQUEST_SECONDS = Family(
    "moeray_request_seconds", Kind.HISTOGRAM, "From a request's arrival to the end of its answer.",
    ("model", "tenant", "protocol"), _SECONDS,
)  # fmt: skip
TTFT_SECONDS = Family(
    "moeray_ttft_seconds", Kind.HISTOGRAM, "From a request's admission to its first token.", ("model",), _SECONDS
)
TPOT_SECONDS = Family(
    "moeray_tpot_seconds", Kind.HISTOGRAM, "Between the tokens of an answer.", ("model",), _TOKEN_SECONDS
)
QUEUE_SECONDS = Family(
    "moeray_queue_seconds", Kind.HISTOGRAM, "From a request's admission until a shard has it.", ("model",), _SECONDS
)
TOKENS = _counter("moeray_tokens_total", "Tokens of prompts, of those found in a cache, of answers.", "model", "kind")
TENANT_TOKENS = _counter("moeray_tenant_tokens_total", "The same, as tenants are charged.", "model", "tenant", "kind")
QUOTA_REJECTIONS = _counter(
    "moeray_quota_rejections_total", "Requests refused because a limit of their tenant was reached.", "tenant", "limit"
)
REPLAYS = _counter("moeray_replays_total", "Requests that went on on another shard after theirs was lost.", "model")
IN_FLIGHT = _gauge("moeray_in_flight_sequences", "Sequences that an ingress has with shards or waiting.", "model")
WAITING = _gauge("moeray_waiting_sequences", "Of these, without a shard.", "model")
ADMITTED_TOKENS = _gauge(
    "moeray_admitted_tokens", "Tokens, at their most, of the requests that this ingress has admitted.", "model"
)
KV_CAPACITY = _gauge("moeray_kv_capacity_tokens", "Tokens that the KV caches of the ready shards hold.", "model")
SHARDS = _gauge("moeray_ingress_shards", "Shards by the state of this ingress' link to them.", "state")

# ---- of the members, by each for itself

STAGE = _gauge("moeray_member_serving", "1 once a process has nothing left to load.", *_MEMBER)
SEQUENCES = _gauge("moeray_shard_sequences", "Sequences in a shard's engine.", *_MEMBER, "state")
HOP_CALLS = _counter("moeray_hop_calls_total", "Calls of expert groups, one for each layer of a step.", *_MEMBER)
HOP_TOKENS = _counter("moeray_hop_tokens_total", "Tokens in these calls.", *_MEMBER)
HOP_SECONDS = _counter(
    "moeray_hop_seconds_total", "Time of these calls: dispatch, overlap (the shared expert), combine (the wait).",
    *_MEMBER, "part",
)  # fmt: skip
HOP_STAGES = _gauge("moeray_hop_stage_seconds", "Mean time of a call by stage, in this generation.", *_MEMBER, "stage")
HOP_FAILURES = _counter("moeray_hop_failures_total", "Calls that were sent again: a group was lost.", *_MEMBER)
HOP_STALLED = _counter("moeray_hop_stalled_seconds_total", "Time that calls waited for lost experts.", *_MEMBER)
HOP_LONGEST = _gauge("moeray_hop_longest_stall_seconds", "The longest of these waits.", *_MEMBER)
HOP_GENERATION = _gauge("moeray_hop_generation", "The generation that a shard uses.", *_MEMBER)
STEPS = _counter("moeray_steps_total", "Steps of a shard's engine.", *_MEMBER)
STEP_TOKENS = _counter("moeray_step_tokens_total", "Tokens that these steps computed.", *_MEMBER)
STEP_SECONDS = _counter("moeray_step_seconds_total", "Time of these steps.", *_MEMBER)
KV_CHOICES = _counter("moeray_kv_choices_total", "Prompts by why their blocks were fetched or not.", *_MEMBER, "choice")
KV_FETCHED_TOKENS = _counter("moeray_kv_fetched_tokens_total", "Tokens of prompts that were fetched.", *_MEMBER)
KV_BLOCKS = _counter("moeray_kv_blocks_total", "KV blocks by tier and what became of them.", *_MEMBER, "tier", "what")
KV_BYTES = _counter("moeray_kv_fetched_bytes_total", "Bytes of KV blocks that were fetched.", *_MEMBER, "tier")
KV_FAILURES = _counter("moeray_kv_failures_total", "Calls of a tier that failed.", *_MEMBER, "tier")
KV_IN_USE = _gauge("moeray_kv_tier_in_use", "0 while a tier is left alone, or broken.", *_MEMBER, "tier")
WEIGHT_BYTES = _gauge("moeray_weight_bytes", "Weights (and Engram rows) that a process holds.", *_MEMBER)
EXPERT_TOKENS = _counter(
    "moeray_expert_layer_tokens_total", "Token-expert pairs that a group computed.", *_MEMBER, "layer"
)
EXPERT_HOTTEST = _counter(
    "moeray_expert_layer_hottest_tokens_total", "Of these, of the layer's busiest expert in the group.",
    *_MEMBER, "layer",
)  # fmt: skip
EXPERT_QUANTILES = _gauge(
    "moeray_expert_tokens", "Tokens of one expert of a layer since the group began, over all of them.",
    *_MEMBER, "quantile",
)  # fmt: skip
EXPERT_CALLS = _counter("moeray_expert_calls_total", "Calls that a group computed.", *_MEMBER)
EXPERT_SECONDS = _counter("moeray_expert_seconds_total", "Time that a group computed.", *_MEMBER)
EXPERT_COPIES = _gauge("moeray_expert_copies", "Redundant expert slots that a group holds, of a layer.", *_MEMBER)
ENGRAM_ROWS = _counter("moeray_engram_rows_sent_total", "Rows that an Engram row server has sent.", *_MEMBER)

# ---- of the cluster, by its controller; every ingress shows them

GENERATION = _gauge("moeray_generation", "The generation in force; 0 before the first.")
COMPLETE = _gauge("moeray_generation_complete", "1 while every group of the generation lives.")
COVERED = _gauge("moeray_generation_covered", "1 while every expert has a living copy.")
MEMBERS = _gauge("moeray_members", "Processes by role and state.", "role", "state")
WANTED = _gauge("moeray_pool_wanted", "Processes that a pool is to have.", "pool")
COPIES = _gauge("moeray_expert_copies_fewest", "Copies of the expert that has the fewest.", "counted")
EXPERTS_LOST = _gauge("moeray_experts_lost", "Experts of a layer without a living copy; their requests wait.")
MISMATCHES = _gauge("moeray_model_mismatches", "Processes that have loaded another model than the others.")
LOSSES = _counter("moeray_losses_total", "Processes that died, hung or were silent.", "role")
GENERATIONS = _counter("moeray_generations_total", "Generations that came in force while this controller lives.")
SCALING = _counter("moeray_scaling_decisions_total", "Changes of a pool's size.", "pool", "direction", "cause")

FAMILIES: tuple[Family, ...] = tuple(each for each in list(globals().values()) if isinstance(each, Family))


def known_series(families: Iterable[Family] = FAMILIES) -> frozenset[str]:
    """Every name that a query may have."""
    return frozenset(name for each in families for name in each.series)
