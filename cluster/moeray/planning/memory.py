"""Bytes per role: what weights take, what a request's context takes, and how many requests fit."""

from __future__ import annotations

from dataclasses import dataclass

from moeray.planning.formats import FORMATS, Formats
from moeray.planning.hardware import Hardware
from moeray.planning.shape import ModelShape
from moeray.planning.topology import Topology

USABLE = 0.9
"""Of a device's memory: the rest is the runtime's, graphs' and fragments (vLLM's gpu_memory_utilization)."""
STEP_TOKENS = 8192
"""Of the largest step, whose activations must fit."""
LIVE_ROWS = 8
"""Rows of hidden width (in bf16, per stream) that are alive at once for a token of a step."""


@dataclass(frozen=True, slots=True)
class RoleMemory:
    """Of one process with one device (a rank), in bytes; `requests`: that fit beside each other; -1: weights do not.

    Attributes:
        kv_per_request: at the workload's mean context; 0 of an expert group.
        buffers: activations of the largest step and messages of the hop.
        host: in the memory of the node: n-gram tables.
    """

    role: str
    weights: float
    kv_per_request: float
    buffers: float
    host: float
    requests: int


def shard_weights(shape: ModelShape, formats: Formats, tensor: int = 1) -> float:
    """Bytes of all but routed experts and n-gram tables, of one of `tensor` ranks."""
    matrix = FORMATS[formats.other].bytes_each
    plain = FORMATS["bf16"].bytes_each if formats.other in ("fp8", "fp4", "int4") else matrix
    by_head = sum(each.by_head for each in shape.attention)
    shared = shape.moe_layers * shape.shared + (shape.layers - shape.moe_layers) * shape.dense_parameters
    whole = sum(each.parameters for each in shape.attention) - by_head
    kept = shape.moe_layers * shape.router + shape.layers * shape.hyper
    return matrix * (whole + (by_head + shared) / tensor) + plain * (kept + shape.other / tensor)


def expert_weights(shape: ModelShape, formats: Formats, ranks: int, redundant: int = 0) -> float:
    """Bytes of one of `ranks` ranks' routed experts, copies included."""
    each_layer = (shape.experts + redundant) / ranks
    return FORMATS[formats.routed].bytes_each * shape.moe_layers * each_layer * shape.expert


def kv_bytes(shape: ModelShape, formats: Formats, context: int) -> float:
    """Of one request with so many tokens."""
    return sum(
        formats.kv_bytes * each.width * (each.entries(context) + min(context, each.window))
        + formats.index_bytes * each.index_width * each.entries(context)
        for each in shape.attention
    )


def buffers(shape: ModelShape, formats: Formats, step_tokens: int = STEP_TOKENS) -> float:
    """Activations of a step, and messages out and back."""
    rows = LIVE_ROWS * shape.streams * 2.0
    messages = shape.top_k * (formats.dispatch_bytes + formats.combine_bytes)
    return step_tokens * shape.hidden * (rows + messages)


def shard_memory(shape: ModelShape, formats: Formats, device: Hardware, topology: Topology, context: int) -> RoleMemory:
    """Of an attention shard, or of a rank of plain expert parallelism, which has experts, too."""
    weights = shard_weights(shape, formats, topology.tensor)
    if topology.kind != "split":
        weights += expert_weights(shape, formats, topology.attention)
    used, per_request = buffers(shape, formats), kv_bytes(shape, formats, context)
    free = device.memory * USABLE - weights - used
    fits = int(free / per_request) if free >= 0 else -1
    engram = FORMATS["bf16"].bytes_each * shape.engram
    return RoleMemory(
        "attention shard" if topology.kind == "split" else "rank", weights, per_request, used, engram, fits
    )


def group_memory(shape: ModelShape, formats: Formats, device: Hardware, topology: Topology) -> RoleMemory:
    """Of an expert group; `requests` is 0 where it fits."""
    weights = expert_weights(shape, formats, topology.groups, topology.redundant)
    used = STEP_TOKENS * shape.hidden * (formats.dispatch_bytes + formats.combine_bytes * min(shape.top_k, 2))
    fits = 0 if weights + used <= device.memory * USABLE else -1
    return RoleMemory("expert group", weights, 0.0, used, 0.0, fits)
