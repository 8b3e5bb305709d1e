"""The time of one step: a roofline per part, and who waits for whom.

A part (attention's matrices, its cache, shared expert, routed experts, LM head) takes what its arithmetic or its bytes
take, whichever is more, at the share of the data sheet that `Efficiency` says. Parts of one device follow each other.
Between devices there is a message each way: its latency, and its bytes through the narrower of the two links.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from moeray.planning.efficiency import Efficiency
from moeray.planning.formats import FORMATS, FormatName, Formats
from moeray.planning.hardware import Hardware
from moeray.planning.shape import Attention, ModelShape
from moeray.planning.topology import Topology

US = 1e6
MICRO_BATCHES = (1, 2, 3)
ROUNDS = 8
"""Of the fixed point between a layer's time and how often shards meet in a group."""


@dataclass(frozen=True, slots=True)
class Machines:
    """What shards run on, what groups run on, and how well.

    Attributes:
        shared_cores: devices that all processes share, where they are cores of one machine; 0: each has its own.
    """

    attention: Hardware
    experts: Hardware
    efficiency: Efficiency
    shared_cores: int = 0


@dataclass(frozen=True, slots=True)
class Work:
    """One step of one shard or rank.

    Attributes:
        tokens: that are computed.
        context: tokens before each.
        is_prefill: the tokens are of one prompt, and read one cache together.
    """

    tokens: float
    context: int
    is_prefill: bool = False


@dataclass(frozen=True, slots=True)
class StepTime:
    """Microseconds. The parts are those of one micro-batch after the other; what overlaps makes `total` less.

    Attributes:
        micro_batches: in so many parts the step is cut, because that is fastest.
        bound: what it would have to be shortened by: attention, experts or hop.
    """

    total: float
    attention: float
    shared: float
    hop: float
    experts: float
    head: float
    fixed: float
    micro_batches: int
    bound: str


@dataclass(frozen=True, slots=True)
class _Layer:
    """Microseconds of one layer's parts for one micro-batch; `all_experts`: with what all shards send at once."""

    attention: float
    shared: float
    hop: float
    experts: float
    all_experts: float


def step_time(
    shape: ModelShape, formats: Formats, topology: Topology, machines: Machines, work: Work, cuts: tuple[int, ...] = ()
) -> StepTime:
    """Of one shard (split), of the engine (tensor) or of each rank (data), all of which do the same work.

    Args:
        cuts: numbers of micro-batches that may be tried; () is what the topology can do.
    """
    cuts = cuts or _cuts(topology, work)
    return min((_cut(shape, formats, topology, machines, work, cut) for cut in cuts), key=lambda each: each.total)


def _cuts(topology: Topology, work: Work) -> tuple[int, ...]:
    if topology.kind == "tensor":
        return (1,)
    most = 2 if topology.kind == "data" else max(MICRO_BATCHES)
    return tuple(cut for cut in MICRO_BATCHES if cut <= min(most, max(1, work.tokens)))


def _cut(shape: ModelShape, formats: Formats, topology: Topology, machines: Machines, work: Work, cut: int) -> StepTime:
    part = Work(work.tokens / cut, work.context, work.is_prefill)
    totals, critical = dict.fromkeys(("attention", "shared", "hop", "experts"), 0.0), 0.0
    dense_us = _mlp_us(shape.dense_parameters, formats, topology, machines, work)
    for attention, count in Counter(shape.attention).items():
        moe = count * shape.moe_layers / shape.layers
        layer = _layer(shape, formats, topology, machines, part, attention)
        critical += moe * _layer_us(layer, topology, machines, cut)
        critical += (count - moe) * (layer.attention * cut + dense_us)
        totals["attention"] += count * layer.attention * cut
        totals["shared"] += moe * layer.shared * cut
        totals["hop"] += moe * layer.hop * cut
        totals["experts"] += moe * layer.experts * cut
    totals["shared"] += (shape.layers - shape.moe_layers) * dense_us
    head = _head_us(shape, topology, machines, work)
    fixed = machines.efficiency.step_us + (machines.efficiency.split_us if topology.kind == "split" else 0.0)
    bound = max(("attention", "experts", "hop"), key=lambda name: totals[name])
    return StepTime(
        critical + head + fixed, totals["attention"], totals["shared"], totals["hop"], totals["experts"], head, fixed,
        cut, bound,
    )  # fmt: skip


def _layer_us(layer: _Layer, topology: Topology, machines: Machines, cut: int) -> float:
    """One layer of the whole step on its critical path."""
    own = layer.attention + layer.shared
    if topology.kind == "tensor":
        return own + layer.hop + layer.experts
    if topology.kind == "data":
        if cut == 1:
            return layer.attention + max(layer.shared, layer.hop + layer.experts)
        return max(cut * (own + layer.experts), own + layer.hop + layer.experts)
    total = 0.0
    for _ in range(ROUNDS):  # the busier a group, the more of a call are others' tokens
        others = (topology.attention - 1) * layer.experts
        share = min(1.0, others / total) if total else 0.0
        away = layer.hop + layer.experts + share * (layer.all_experts - layer.experts)
        if cut == 1:
            total = layer.attention + max(layer.shared, away)
        else:
            total = max(cut * own, cut * layer.all_experts, own + away)
    busy = cut * (topology.attention * own + topology.groups * layer.all_experts)
    return _beside_others(total, busy, machines)


def _beside_others(total: float, busy: float, machines: Machines) -> float:
    """With cores that are shared, and that slow each other down when they are busy at once (SMT, caches, memory)."""
    cores = machines.shared_cores
    if not cores:
        return total
    total = max(total, busy / cores)
    overlap = max(0.0, busy / total - 1) / (cores - 1) if cores > 1 else 0.0
    return total * (1 + machines.efficiency.interference * min(1.0, overlap))


def _layer(
    shape: ModelShape, formats: Formats, topology: Topology, machines: Machines, work: Work, attention: Attention
) -> _Layer:
    senders = topology.attention if topology.kind != "tensor" else 1
    return _Layer(
        attention=_attention_us(shape, formats, topology, machines, work, attention),
        shared=_mlp_us(shape.shared, formats, topology, machines, work),
        hop=_all_reduce_us(shape, topology, machines, work)
        if topology.kind == "tensor"
        else _hop_us(shape, formats, topology, machines, work),
        experts=_experts_us(
            shape, formats, topology, machines, work.tokens * (senders if topology.kind == "data" else 1)
        ),
        all_experts=_experts_us(shape, formats, topology, machines, work.tokens * senders),
    )


def _attention_us(
    shape: ModelShape, formats: Formats, topology: Topology, machines: Machines, work: Work, layer: Attention
) -> float:
    """Matrices, router and hyper-connections; then the cache."""
    efficiency, device, tensor = machines.efficiency, machines.attention, topology.tensor
    matrices = layer.parameters - layer.by_head + layer.by_head / tensor + shape.router + shape.hyper
    streams = 2 * shape.streams * shape.hidden * 2.0 * 3  # read, mixed and written around both parts, in bf16
    linear = _roofline(
        2 * matrices * work.tokens, FORMATS[formats.other].bytes_each * matrices + work.tokens * streams,
        device, formats.other, efficiency.attention_flops, efficiency.attention_bandwidth,
    )  # fmt: skip
    entries, read = layer.entries(work.context), layer.entries_read(work.context)
    flops = 4 * layer.heads / tensor * read * layer.width + 2 * layer.index_heads * layer.index_width * entries
    kept = formats.kv_bytes * layer.width * read + formats.index_bytes * layer.index_width * entries
    cache = _roofline(
        flops * work.tokens, kept * (1 if work.is_prefill else work.tokens),
        device, "bf16", efficiency.attention_flops, efficiency.attention_bandwidth,
    )  # fmt: skip
    return efficiency.layer_us + linear + cache


def _mlp_us(parameters: int, formats: Formats, topology: Topology, machines: Machines, work: Work) -> float:
    """A shared expert, or the MLP of a layer that has no experts."""
    return _roofline(
        2 * parameters * work.tokens / topology.tensor,
        FORMATS[formats.other].bytes_each * parameters / topology.tensor,
        machines.attention, formats.other,
        machines.efficiency.attention_flops, machines.efficiency.attention_bandwidth,
    )  # fmt: skip


def _experts_us(shape: ModelShape, formats: Formats, topology: Topology, machines: Machines, tokens: float) -> float:
    """One call of one rank; `tokens` of all ranks together."""
    efficiency, ranks = machines.efficiency, topology.expert_ranks
    device = machines.experts if topology.kind == "split" else machines.attention
    rows = efficiency.imbalance * tokens * shape.top_k / ranks if ranks > 1 else tokens * shape.top_k
    return efficiency.expert_us + _roofline(
        2 * rows * shape.expert, FORMATS[formats.routed].bytes_each * touched(shape, tokens) / ranks * shape.expert,
        device, formats.routed, efficiency.expert_flops, efficiency.expert_bandwidth,
    )  # fmt: skip


def touched(shape: ModelShape, tokens: float) -> float:
    """Different experts of one layer that so many tokens go to, if all are equally likely."""
    untouched: float = (1 - shape.top_k / shape.experts) ** tokens
    return shape.experts * (1 - untouched)


def _hop_us(shape: ModelShape, formats: Formats, topology: Topology, machines: Machines, work: Work) -> float:
    """There and back. A row goes to each group once that has any of its experts; each expert's row comes back."""
    efficiency, ranks = machines.efficiency, topology.expert_ranks
    near, near_us = machines.attention.link(topology.devices)
    far_end, far_us = machines.experts.link(topology.devices)
    copies = ranks * (1 - (1 - 1 / ranks) ** shape.top_k)
    row = copies * formats.dispatch_bytes + shape.top_k * formats.combine_bytes
    at_shard = work.tokens * shape.hidden * row / near
    at_group = at_shard * near / far_end * topology.attention / ranks
    way = 2 * efficiency.latency * max(near_us, far_us) + US * max(at_shard, at_group) / efficiency.link
    return way + efficiency.hop_us + efficiency.token_us * work.tokens + efficiency.message_us * ranks


def _all_reduce_us(shape: ModelShape, topology: Topology, machines: Machines, work: Work) -> float:
    """Two in a layer: after attention and after the experts, in bf16, as a ring."""
    ranks = topology.attention
    if ranks == 1:
        return 0.0
    bandwidth, latency_us = machines.attention.link(ranks)
    moved = 2 * (ranks - 1) / ranks * work.tokens * shape.hidden * 2.0
    return 2 * (2 * machines.efficiency.latency * latency_us + US * moved / bandwidth / machines.efficiency.link)


def _head_us(shape: ModelShape, topology: Topology, machines: Machines, work: Work) -> float:
    """Of a prompt's step only the last token has an answer."""
    tokens = 1 if work.is_prefill else work.tokens
    return _roofline(
        2 * shape.head * tokens / topology.tensor, 2.0 * shape.head / topology.tensor, machines.attention, "bf16",
        machines.efficiency.attention_flops, machines.efficiency.attention_bandwidth,
    )  # fmt: skip


def _roofline(
    flops: float, moved: float, device: Hardware, name: FormatName, share: float, bandwidth_share: float
) -> float:
    """Microseconds of so many operations and bytes."""
    return US * max(
        flops / (device.flops(FORMATS[name].computed) * share), moved / (device.bandwidth * bandwidth_share)
    )
