"""What of a model's config.json costs memory and time: parameters by part, and what attention keeps of a token.

Read from the keys that transformers' DeepseekV3Config and DeepseekV4Config have, and DeepSeek's own names where they
differ. Parameters are counted as transformers builds the model; tests compare with it, and with what was published.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

Kind = Literal["latent", "sparse", "compressed", "window"]
"""MLA; compressed sparse attention (CSA); heavily compressed attention (HCA); a sliding window only."""

KIND_OF_RATIO: Mapping[int, Kind] = {0: "window", 4: "sparse", 128: "compressed"}
KIND_OF_NAME: Mapping[str, Kind] = {
    "sliding_attention": "window",
    "compressed_sparse_attention": "sparse",
    "heavily_compressed_attention": "compressed",
}


class ShapeError(ValueError):
    """A config.json that does not say what is needed; the message names the key."""


@dataclass(frozen=True, slots=True)
class Attention:
    """Of one layer.

    Attributes:
        parameters: of all of it.
        by_head: of these, what tensor parallelism divides.
        ratio: tokens of context per entry that is kept; 0: none but the window.
        width: values of an entry.
        window: tokens that are kept whole beside the entries, of `width` values each.
        index_width: values per entry by which entries are chosen; 0: all entries are read.
        index_heads: queries that choose.
        chosen: entries that are read at most, where they are chosen.
        heads: queries that read.
    """

    kind: Kind
    parameters: int
    by_head: int
    ratio: int
    width: int
    window: int
    index_width: int
    index_heads: int
    chosen: int
    heads: int

    def entries(self, context: int) -> int:
        """That are kept of so many tokens, without the window's."""
        return context // self.ratio if self.ratio else 0

    def entries_read(self, context: int) -> int:
        """By one token, the window's with them."""
        entries = self.entries(context)
        return (min(entries, self.chosen) if self.index_width else entries) + min(context, self.window)


@dataclass(frozen=True, slots=True)
class ModelShape:
    """See module docstring.

    Attributes:
        attention: by layer.
        moe_layers: layers with experts; the others have `dense_parameters` each.
        router, shared, expert: parameters of one layer's router and shared experts, of one routed expert.
        hyper: parameters of one layer's hyper-connections (mHC).
        streams: residual streams.
        other: parameters beside the layers: embedding, head, norms.
        head: of these, what each step reads whole: the LM head.
        engram: values in all n-gram tables.
        max_context: tokens.
    """

    name: str
    hidden: int
    attention: tuple[Attention, ...]
    moe_layers: int
    experts: int
    top_k: int
    expert_width: int
    router: int
    shared: int
    expert: int
    dense_parameters: int
    hyper: int
    streams: int
    other: int
    head: int
    engram: int
    max_context: int

    @property
    def layers(self) -> int:
        return len(self.attention)

    @property
    def routed_parameters(self) -> int:
        """Of all routed experts: what expert groups hold."""
        return self.moe_layers * self.experts * self.expert

    @property
    def shard_parameters(self) -> int:
        """Of all else but n-gram tables: what every attention shard holds."""
        dense = (self.layers - self.moe_layers) * self.dense_parameters
        beside = self.moe_layers * (self.router + self.shared) + dense + self.layers * self.hyper
        return sum(each.parameters for each in self.attention) + beside + self.other

    @property
    def parameters(self) -> int:
        """All, without n-gram tables."""
        return self.shard_parameters + self.routed_parameters

    @property
    def active_parameters(self) -> int:
        """That one token is multiplied with; its row of the embedding is none."""
        inactive = self.moe_layers * (self.experts - self.top_k) * self.expert
        return self.parameters - inactive - (self.other - self.head)


def shape_of(config: Mapping[str, Any], name: str) -> ModelShape:
    """Of a config.json's mapping.

    Raises:
        ShapeError: another family, or a key is missing or not a whole number.
    """
    family = config.get("model_type")
    if family == "deepseek_v4":
        return _shape(config, name, _v4_attention(config), _v4_hyper(config), _int(config, "moe_intermediate_size"))
    if family in ("deepseek_v3", "deepseek_v32"):
        return _shape(config, name, _v3_attention(config), 0, _int(config, "intermediate_size"))
    raise ShapeError(f"model_type: {family!r} is not one of deepseek_v3, deepseek_v32, deepseek_v4")


def _shape(
    config: Mapping[str, Any], name: str, attention: tuple[Attention, ...], hyper: int, dense_width: int
) -> ModelShape:
    hidden, vocabulary = _int(config, "hidden_size"), _int(config, "vocab_size")
    layers, experts = len(attention), _int(config, "n_routed_experts")
    width = _int(config, "moe_intermediate_size")
    head = vocabulary * hidden
    norms = 2 * layers * hidden + hidden
    streams = int(config.get("hc_mult", 1)) if hyper else 1
    return ModelShape(
        name=name,
        hidden=hidden,
        attention=attention,
        moe_layers=layers - int(config.get("first_k_dense_replace", 0)),
        experts=experts,
        top_k=_int(config, "num_experts_per_tok"),
        expert_width=width,
        router=experts * hidden,
        shared=3 * hidden * width * _int(config, "n_shared_experts"),
        expert=3 * hidden * width,
        dense_parameters=3 * hidden * dense_width,
        hyper=hyper,
        streams=streams,
        other=2 * head + norms + (_hyper_head(config) if hyper else 0),
        head=head,
        engram=_engram(config),
        max_context=_int(config, "max_position_embeddings"),
    )


def _v3_attention(config: Mapping[str, Any]) -> tuple[Attention, ...]:
    """MLA: of a token its latent and its rotary part are kept."""
    hidden, heads = _int(config, "hidden_size"), _int(config, "num_attention_heads")
    q_rank, kv_rank = _int(config, "q_lora_rank"), _int(config, "kv_lora_rank")
    rope, nope, value = (_int(config, key) for key in ("qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim"))
    by_head = q_rank * heads * (nope + rope) + kv_rank * heads * (nope + value) + heads * value * hidden
    parameters = hidden * q_rank + q_rank + hidden * (kv_rank + rope) + kv_rank + by_head
    index_heads = int(config.get("index_n_heads", 0)) if config.get("model_type") == "deepseek_v32" else 0
    index_width = int(config.get("index_head_dim", 0)) if index_heads else 0
    if index_heads:  # queries, keys with a norm, and weights of the lightning indexer
        parameters += q_rank * index_heads * index_width + hidden * (index_width + index_heads) + 2 * index_width
    layer = Attention(
        kind="latent", parameters=parameters, by_head=by_head, ratio=1, width=kv_rank + rope, window=0,
        index_width=index_width, index_heads=index_heads, chosen=int(config.get("index_topk", 0)), heads=heads,
    )  # fmt: skip
    return (layer,) * _int(config, "num_hidden_layers")


def _v4_attention(config: Mapping[str, Any]) -> tuple[Attention, ...]:
    hidden, heads, width = (_int(config, key) for key in ("hidden_size", "num_attention_heads", "head_dim"))
    q_rank, groups, o_rank = (_int(config, key) for key in ("q_lora_rank", "o_groups", "o_lora_rank"))
    index_heads, index_width = _int(config, "index_n_heads"), _int(config, "index_head_dim")
    by_head = q_rank * heads * width + heads * width * o_rank + groups * o_rank * hidden + heads
    base = hidden * q_rank + q_rank + hidden * width + width + by_head
    found = []
    for kind in _v4_kinds(config):
        own, ratio = 0, {"sparse": 4, "compressed": 128, "window": 0}[kind]
        if kind == "compressed":
            own = 2 * hidden * width + ratio * width + width
        if kind == "sparse":  # compressor and indexer keep two overlapping halves
            own = 4 * hidden * width + 2 * ratio * width + width
            own += 4 * hidden * index_width + 2 * ratio * index_width + index_width
            own += q_rank * index_heads * index_width + hidden * index_heads
        found.append(Attention(
            kind=kind, parameters=base + own, by_head=by_head, ratio=ratio, width=width,
            window=_int(config, "sliding_window"), index_width=index_width if kind == "sparse" else 0,
            index_heads=index_heads if kind == "sparse" else 0, chosen=_int(config, "index_topk"), heads=heads,
        ))  # fmt: skip
    return tuple(found)


def _v4_kinds(config: Mapping[str, Any]) -> list[Kind]:
    layers = _int(config, "num_hidden_layers")
    if (ratios := config.get("compress_ratios")) is not None:
        unknown = [each for each in ratios if each not in KIND_OF_RATIO]
        if unknown or len(ratios) < layers:
            raise ShapeError(f"compress_ratios: {layers} of 0, 4 and 128 are needed, not {unknown or ratios}")
        return [KIND_OF_RATIO[each] for each in ratios[:layers]]  # a draft layer's may follow
    if (names := config.get("layer_types")) is not None:
        if len(names) != layers or any(each not in KIND_OF_NAME for each in names):
            raise ShapeError(f"layer_types: {layers} of {', '.join(KIND_OF_NAME)} are needed")
        return [KIND_OF_NAME[each] for each in names]
    raise ShapeError("compress_ratios: is missing (layer_types would do, too)")


def _v4_hyper(config: Mapping[str, Any]) -> int:
    """Two connections per layer, around attention and around the experts, and their norms."""
    streams, hidden = _int(config, "hc_mult"), _int(config, "hidden_size")
    mixes = streams * (streams + 2)
    return 2 * (mixes * streams * hidden + mixes + 3)


def _hyper_head(config: Mapping[str, Any]) -> int:
    streams, hidden = _int(config, "hc_mult"), _int(config, "hidden_size")
    return streams * streams * hidden + streams + 1


def _engram(config: Mapping[str, Any]) -> int:
    """Values: rows of each layer's tables, for each hash head and n-gram length, times a head's width."""
    rows = config.get("engram_num_embeddings") or ()
    return sum(int(each) for each in rows) * int(config.get("engram_head_dim", 0))


def _int(config: Mapping[str, Any], key: str) -> int:
    value = config.get(key)
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise ShapeError(f"{key}: {'is missing' if value is None else f'{value!r} is not a whole number'}")
    return value
