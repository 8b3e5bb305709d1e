"""The training model: transformers' DeepSeek-V4 at moeray-tiny's shape, with an Engram.

The head and index sizes are the ones that V4's kernels fix; everything else is small.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import DeepseekV4Config, DeepseekV4ForCausalLM
from transformers.models.deepseek_v4 import modeling_deepseek_v4 as modeling

from moeray.tiny import attention, streams
from moeray.tiny.engram import Engram, EngramConfig, TokenMap

LAYER_TYPES = (
    "sliding_attention",
    "compressed_sparse_attention",
    "heavily_compressed_attention",
    "compressed_sparse_attention",
)
NUM_HASH_LAYERS = 2
EMBEDDING_STD = 0.7
EMBEDDING_OFFSET_STD = 0.35
MAX_POSITIONS = 8192
ENGRAM = EngramConfig()


def build_config(vocab_size: int) -> DeepseekV4Config:
    """Return the configuration of the shipped shape."""
    config = DeepseekV4Config(
        vocab_size=vocab_size,
        hidden_size=128,
        moe_intermediate_size=64,
        num_hidden_layers=len(LAYER_TYPES),
        num_attention_heads=4,
        num_key_value_heads=1,
        head_dim=512,
        q_lora_rank=64,
        o_groups=2,
        o_lora_rank=32,
        index_n_heads=4,
        index_head_dim=128,
        index_topk=512,
        n_routed_experts=16,
        num_experts_per_tok=2,
        n_shared_experts=1,
        routed_scaling_factor=1.5,
        layer_types=list(LAYER_TYPES),
        mlp_layer_types=["hash_moe"] * NUM_HASH_LAYERS + ["moe"] * (len(LAYER_TYPES) - NUM_HASH_LAYERS),
        hc_mult=4,
        hc_sinkhorn_iters=20,
        swiglu_limit=10.0,
        sliding_window=128,
        num_nextn_predict_layers=0,
        max_position_embeddings=MAX_POSITIONS,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
        rope_parameters={
            "rope_type": "yarn",
            "factor": 4.0,
            "original_max_position_embeddings": MAX_POSITIONS // 4,
            "beta_fast": 32,
            "beta_slow": 1,
            "rope_theta": 10000.0,
        },
    )
    config.architectures = ["DeepseekV4ForCausalLM"]
    return config


def build_model(vocab_size: int, token_map: TokenMap) -> DeepseekV4ForCausalLM:
    """Return the uninitialised fp32 model with an Engram on ``ENGRAM.layer_ids``."""
    config = build_config(vocab_size)
    attention.install()
    streams.install()
    config._attn_implementation = attention.NAME
    model = DeepseekV4ForCausalLM(config)
    for layer_id in ENGRAM.layer_ids:
        layer = model.model.layers[layer_id]
        layer.engram = Engram(ENGRAM, layer_id, token_map, config.hidden_size, config.hc_mult, config.rms_norm_eps)
        layer.register_forward_pre_hook(_add_engram, with_kwargs=True)
    return model


def _add_engram(
    layer: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Tensor, ...], dict[str, Any]]:
    engram: Any = layer.engram
    return (engram(args[0], kwargs["input_ids"]), *args[1:]), kwargs


def initialise(model: DeepseekV4ForCausalLM, seed: int) -> None:
    """Draw every parameter and the hash routing table from one generator."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            _initialise_one(name, tensor, model.config, generator)
        _tie_start(model, generator)


def _initialise_one(name: str, t: Tensor, config: Any, generator: torch.Generator) -> None:
    def normal(std: float) -> None:
        t.copy_(torch.randn(t.shape, generator=generator) * std)

    if name.endswith("tid2eid"):
        experts, top_k = config.n_routed_experts, config.num_experts_per_tok
        rows = [torch.randperm(experts, generator=generator)[:top_k] for _ in range(len(t))]
        t.copy_(torch.stack(rows).to(t.dtype))
    elif name.endswith(("sinks", "e_score_correction_bias")):
        t.zero_()
    elif name.endswith(("norm.weight", "layernorm.weight", "q_weight", "k_weight")):
        t.fill_(1.0)
    elif name.endswith("position_bias"):
        normal(0.1)
    elif name.endswith("base"):
        normal(0.3)
        if len(t) > config.hc_mult:  # the stream-mixing part starts near the identity
            t[2 * config.hc_mult :] += 4 * torch.eye(config.hc_mult).flatten()
    elif name.endswith("scale"):
        t.fill_(0.3)
    elif name.endswith("engram.embed.weight"):
        normal(1.0)
    elif name.endswith("engram.wkv.weight"):
        normal(0.5 * t.shape[-1] ** -0.5)
    elif "o_b_proj" in name or "down_proj" in name:
        normal((2 * config.num_hidden_layers * t.shape[-1]) ** -0.5)
    elif "embed_tokens" in name:
        normal(EMBEDDING_STD)
    elif t.is_floating_point() and t.dim() >= 2:
        normal(t.shape[-1] ** -0.5)


def _tie_start(model: DeepseekV4ForCausalLM, generator: torch.Generator) -> None:
    """Start the output head as the embedding, and give all embeddings a common offset.

    The first lets a copied token be emitted at once; with the second every key has a constant
    part, so that RoPE (64 of 512 dimensions, no bias) can express "the token before".
    """
    embedding = model.model.embed_tokens.weight
    hidden = embedding.shape[-1]
    model.lm_head.weight.copy_(embedding / (EMBEDDING_STD * hidden**0.5))
    embedding += torch.randn(hidden, generator=generator) * EMBEDDING_OFFSET_STD


class BiasBalancer:
    """Moves the router's correction bias against the load: it gets no gradient."""

    def __init__(self, model: nn.Module) -> None:
        self.routers: list[Any] = [m for m in model.modules() if isinstance(m, modeling.DeepseekV4TopKRouter)]
        self.counts = [torch.zeros(router.num_experts) for router in self.routers]
        for router, counts in zip(self.routers, self.counts, strict=True):
            router.register_forward_hook(self._counter(counts))

    @staticmethod
    def _counter(counts: Tensor) -> Any:
        def hook(router: Any, _: object, output: tuple[Tensor, Tensor, Tensor]) -> None:
            if router.training:
                counts.add_(torch.bincount(output[2].flatten(), minlength=router.num_experts))

        return hook

    def step(self, rate: float) -> float:
        """Shift each bias by ``rate`` towards balance; return the worst max/mean load since last."""
        worst = 1.0
        for router, counts in zip(self.routers, self.counts, strict=True):
            router.e_score_correction_bias += rate * torch.sign(counts.mean() - counts)
            worst = max(worst, float(counts.max() / counts.mean().clamp_min(1)))
            counts.zero_()
        return worst
