"""transformers' own DeepSeek-V4 in fp32, of any checkpoint directory with DeepSeek's tensor names.

It shares no line with what it judges: attention, routing, experts and hyper-connections are transformers' (its eager
attention, every indexer score computed), Engram is the PyTorch reference of `moeray.tiny.engram`. Only what
transformers leaves out is added here: Engram, and any number of shared experts (transformers always builds one).

Suffixes: B batch, N heads, S queries, K keys, D head, T tokens, V vocabulary.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import DeepseekV4Config, DeepseekV4ForCausalLM, PreTrainedTokenizerFast
from transformers.models.deepseek_v4 import modeling_deepseek_v4 as modeling

from moeray.tiny import attention, export, streams
from moeray.tiny.architecture import _add_engram
from moeray.tiny.engram import Engram, EngramConfig, build_token_map

ENGRAM_PREFIX = "engram_"
# vLLM's fp8_ds_mla: 448 dimensions without rotation as e4m3 with one power-of-two scale per 64, 64 rotated ones as bf16
NOPE_DIM, SCALE_BLOCK, E4M3_MAX, SMALLEST_AMAX = 448, 64, 448.0, 1e-4
# Whose results an engine in bf16 rounds; the router and the hyper-connections' weights stay in fp32.
BF16_PARTS = (
    nn.Linear,
    nn.Embedding,
    modeling.DeepseekV4RMSNorm,
    modeling.DeepseekV4MLP,
    modeling.DeepseekV4Experts,
    modeling.DeepseekV4Attention,
    modeling.DeepseekV4DecoderLayer,
)


class NoSharedExpert(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.zeros_like(x)


def build(directory: Path) -> DeepseekV4ForCausalLM:
    """The uninitialised fp32 model that config.json and the tokenizer of `directory` describe."""
    keys = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    known = {k: v for k, v in keys.items() if not k.startswith(ENGRAM_PREFIX) and k != "dtype"}
    config = DeepseekV4Config(**known | {"swiglu_limit": float(keys["swiglu_limit"] or math.inf)})
    config._attn_implementation = "eager"
    model = DeepseekV4ForCausalLM(config).float().eval()
    _fit_shared_experts(model, keys["n_shared_experts"])
    if keys.get("engram_layer_ids"):
        _add_engrams(model, keys, directory)
    return model


def _fit_shared_experts(model: DeepseekV4ForCausalLM, count: int) -> None:
    """DeepSeek's own code: one MLP of `count` times the width of a routed expert, or none."""
    for layer in model.model.layers:
        config = layer.mlp.shared_experts.config
        if count == 0:
            layer.mlp.shared_experts = NoSharedExpert()
        elif count > 1:
            width, wide = config.intermediate_size, DeepseekV4Config(**config.to_dict())
            wide.intermediate_size = width * count
            layer.mlp.shared_experts = modeling.DeepseekV4MLP(wide)


def _add_engrams(model: DeepseekV4ForCausalLM, keys: Mapping[str, Any], directory: Path) -> None:
    engram = EngramConfig(
        layer_ids=tuple(keys["engram_layer_ids"]),
        max_ngram_size=keys["engram_max_ngram_size"],
        n_heads=keys["engram_n_heads"],
        head_dim=keys["engram_head_dim"],
        vocab_size=keys["engram_vocab_size"],
        pad_token_id=keys["engram_pad_token_id"],
    )
    token_map = build_token_map(PreTrainedTokenizerFast(tokenizer_file=str(directory / "tokenizer.json")))
    for layer_id in engram.layer_ids:
        layer: Any = model.model.layers[layer_id]
        config = model.config
        layer.engram = Engram(engram, layer_id, token_map, config.hidden_size, config.hc_mult, config.rms_norm_eps)
        layer.register_forward_pre_hook(_add_engram, with_kwargs=True)


def load(directory: Path) -> DeepseekV4ForCausalLM:
    """The checkpoint's weights in fp32; single-file or sharded, plain or in a published format."""
    model = build(directory)
    native: dict[str, Tensor] = {}
    for file in sorted(directory.glob("*.safetensors")):
        native.update(load_file(file))
    config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    fp8_block = config.get("quantization_config", {}).get("weight_block_size")
    values = {name: _value(name, native, fp8_block) for name in native if not name.endswith(".scale")}
    model.load_state_dict(export.training_state(values, list(model.state_dict())))
    return model


def _value(name: str, native: Mapping[str, Tensor], fp8_block: list[int] | None) -> Tensor:
    """A tensor's values, written down once more from the formats' definition: nothing of moeray's reader is used."""
    stored, scale = native[name], native.get(name.removesuffix("weight") + "scale")
    if scale is None:
        return stored
    if stored.dtype == torch.int8:  # two e2m1 (sign, two bits of exponent with bias 1, one of mantissa), low half first
        bits = torch.stack([stored & 15, stored >> 4 & 15], dim=-1).flatten(1).int()
        exponent, mantissa = bits >> 1 & 3, bits & 1
        size = torch.where(exponent == 0, mantissa / 2, (1 + mantissa / 2) * 2.0 ** (exponent - 1))
        stored = torch.where(bits >= 8, -size, size)
    rows, columns = stored.shape
    # e8m0: a power of two, its exponent with bias 127
    factor = scale if scale.dtype == torch.float32 else 2.0 ** (scale.view(torch.uint8).float() - 127)
    high, wide = (1, 32) if native[name].dtype == torch.int8 or ".engram.embed." in name else fp8_block or (0, 0)
    return stored.float() * factor.repeat_interleave(high, 0).repeat_interleave(wide, 1)[:rows, :columns]


@dataclass(frozen=True)
class Logprobs:
    """Teacher-forced over a prompt: `chosen_T` of the tokens 1.., `best_T` the argmax in their places."""

    chosen_T: Tensor
    best_T: Tensor


@torch.no_grad()
def teacher_forced(
    model: DeepseekV4ForCausalLM, prompt: list[int], *, fp8_kv: bool = False, bf16: bool = False
) -> Logprobs:
    """Log-probabilities of `prompt[1:]`, each given what is before it.

    Args:
        fp8_kv: round every key/value entry as vLLM's fp8_ds_mla cache stores it.
        bf16: round what every layer's parts hand on to bf16, as an engine with bf16 activations does.
    """
    with _untouched_transformers(), _key_rounding(fp8_kv), _activation_rounding(model, bf16):
        logits_TV = model(torch.tensor([prompt]), use_cache=False).logits[0, :-1].float()
    logprobs_TV = logits_TV.log_softmax(-1)
    chosen_T = logprobs_TV.gather(1, torch.tensor(prompt[1:])[:, None])[:, 0]
    return Logprobs(chosen_T, logits_TV.argmax(-1))


@contextmanager
def _untouched_transformers() -> Iterator[None]:
    """`moeray.tiny` puts faster equivalents into transformers' classes; a reference wants transformers' own."""
    indexer, connection = modeling.DeepseekV4Indexer.forward, modeling.DeepseekV4HyperConnection.forward
    modeling.DeepseekV4Indexer.forward = attention._full_indexer
    modeling.DeepseekV4HyperConnection.forward = streams.transformers_mixing
    try:
        yield
    finally:
        modeling.DeepseekV4Indexer.forward, modeling.DeepseekV4HyperConnection.forward = indexer, connection


@contextmanager
def _key_rounding(wanted: bool) -> Iterator[None]:
    eager = modeling.eager_attention_forward

    def rounded(module: Any, query: Tensor, key: Tensor, _: Tensor, *args: Any, **kwargs: Any) -> Any:
        key = as_fp8_ds_mla(key)
        return eager(module, query, key, key, *args, **kwargs)

    if wanted:
        modeling.eager_attention_forward = rounded
    try:
        yield
    finally:
        modeling.eager_attention_forward = eager


@contextmanager
def _activation_rounding(model: nn.Module, wanted: bool) -> Iterator[None]:
    def rounded(_: nn.Module, __: Any, output: Any) -> Any:
        if isinstance(output, tuple):
            return (output[0].bfloat16().float(), *output[1:])
        return output.bfloat16().float()

    hooks = [part.register_forward_hook(rounded) for part in model.modules() if wanted and isinstance(part, BF16_PARTS)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def as_fp8_ds_mla(kv: Tensor) -> Tensor:
    """Round [..., 512] to what vLLM's fp8_ds_mla cache can hold; same dtype.

    Source: vLLM's `quantize_and_insert_k_cache` (UE8M0 scales: the power of two at or above amax / 448).
    """
    nope = kv[..., :NOPE_DIM].float().unflatten(-1, (-1, SCALE_BLOCK))
    amax = nope.abs().amax(-1, keepdim=True).clamp_min(SMALLEST_AMAX)
    scale = torch.exp2(torch.ceil(torch.log2(amax / E4M3_MAX)))
    nope = ((nope / scale).to(torch.float8_e4m3fn).float() * scale).flatten(-2)
    return torch.cat([nope, kv[..., NOPE_DIM:].bfloat16().float()], dim=-1).to(kv.dtype)
