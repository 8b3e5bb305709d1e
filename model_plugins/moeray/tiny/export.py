"""Between the training model's tensor names and DeepSeek's own, and the checkpoint directory.

transformers' ``save_pretrained`` does not give DeepSeek's names back for V4 and knows no Engram,
so the names are written down here, once, and used in both directions.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from moeray.tiny.engram import EngramConfig, TokenMap

WEIGHTS = "model.safetensors"
COMPRESS_RATIO = {
    "sliding_attention": 0,
    "compressed_sparse_attention": 4,
    "heavily_compressed_attention": 128,
}
# config.json keys of transformers that vLLM's V4 reads in their legacy form instead
DROPPED_KEYS = ("torch_dtype", "layer_types", "mlp_layer_types", "compress_rates")
# kept in fp32, as DeepSeek ships them
FP32_PATTERN = re.compile(r"hc_|attn_sink|\.ape$|gate\.bias$")

# (training name, DeepSeek name); applied in order, the first match of each pair is replaced
RENAMES = (
    ("model.embed_tokens.", "embed."),
    ("lm_head.", "head."),
    ("model.hc_head.hc_", "hc_head_"),
    ("model.", ""),
    (".self_attn.compressor.indexer.scorer.weights_proj.", ".attn.indexer.weights_proj."),
    (".self_attn.compressor.indexer.q_b_proj.", ".attn.indexer.wq_b."),
    (".self_attn.compressor.indexer.", ".attn.indexer.compressor."),
    (".self_attn.", ".attn."),
    (".compressor.kv_norm.", ".compressor.norm."),
    (".position_bias", ".ape"),
    (".sinks", ".attn_sink"),
    (".q_a_proj.", ".wq_a."),
    (".q_a_norm.", ".q_norm."),
    (".q_b_proj.", ".wq_b."),
    (".attn.kv_proj.", ".attn.wkv."),
    (".compressor.kv_proj.", ".compressor.wkv."),
    (".compressor.gate_proj.", ".compressor.wgate."),
    (".o_a_proj.", ".wo_a."),
    (".o_b_proj.", ".wo_b."),
    (".mlp.", ".ffn."),
    (".e_score_correction_bias", ".bias"),
    (".shared_experts.gate_proj.", ".shared_experts.w1."),
    (".shared_experts.down_proj.", ".shared_experts.w2."),
    (".shared_experts.up_proj.", ".shared_experts.w3."),
    (".input_layernorm.", ".attn_norm."),
    (".post_attention_layernorm.", ".ffn_norm."),
    (".attn_hc.", ".hc_attn_"),
    (".ffn_hc.", ".hc_ffn_"),
)


def native_name(training_name: str) -> str:
    """Return DeepSeek's name of a training tensor (routed experts are split first)."""
    name = training_name
    for ours, theirs in RENAMES:
        name = name.replace(ours, theirs, 1)
    return name


def native_state(state: dict[str, Tensor], dtype: torch.dtype = torch.bfloat16) -> dict[str, Tensor]:
    """Turn a training ``state_dict`` into DeepSeek-named tensors, stored as ``dtype`` where DeepSeek keeps no fp32."""
    out: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if name.endswith("experts.gate_up_proj"):
            prefix = native_name(name.removesuffix("gate_up_proj"))
            for expert, fused in enumerate(tensor):
                out[f"{prefix}{expert}.w1.weight"], out[f"{prefix}{expert}.w3.weight"] = fused.chunk(2)
        elif name.endswith("experts.down_proj"):
            prefix = native_name(name.removesuffix("down_proj"))
            out.update({f"{prefix}{e}.w2.weight": down for e, down in enumerate(tensor)})
        else:
            out[native_name(name)] = tensor
    return {name: _stored(name, tensor, dtype) for name, tensor in sorted(out.items())}


def _stored(name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    # clone: chunks of the fused expert tensors share memory, which safetensors refuses
    tensor = tensor.detach().clone().contiguous()
    if name.endswith("tid2eid"):
        return tensor.to(torch.int64)
    return tensor.to(torch.float32 if FP32_PATTERN.search(name) else dtype)


def training_state(native: dict[str, Tensor], names: list[str]) -> dict[str, Tensor]:
    """Rebuild the fp32 training ``state_dict`` with the given names from DeepSeek-named tensors.

    Raises:
        KeyError: a tensor is missing from the checkpoint.
    """
    out: dict[str, Tensor] = {}
    for name in names:
        fused = name.endswith("experts.gate_up_proj")
        if fused or name.endswith("experts.down_proj"):
            prefix = native_name(name.rsplit(".", 1)[0] + ".")
            parts = ("w1", "w3") if fused else ("w2",)
            count = sum(key.startswith(prefix) and key.endswith("w1.weight") for key in native)
            tensor = torch.stack(
                [torch.cat([native[f"{prefix}{e}.{part}.weight"] for part in parts]) for e in range(count)]
            )
        else:
            tensor = native[native_name(name)]
        out[name] = tensor if tensor.dtype == torch.int64 else tensor.to(torch.float32)
    return out


def config_json(config: Any, engram: EngramConfig, token_map: TokenMap) -> dict[str, Any]:
    """Return config.json: transformers' keys, V4's legacy keys and the Engram keys."""
    keys: dict[str, Any] = config.to_dict()
    for key in DROPPED_KEYS:
        keys.pop(key, None)
    keys.update(
        architectures=["DeepseekV4ForCausalLM"],
        dtype="bfloat16",
        compress_ratios=[COMPRESS_RATIO[kind] for kind in config.layer_types],
        num_hash_layers=config.mlp_layer_types.count("hash_moe"),
        qk_rope_head_dim=64,
        topk_method="noaux_tc",
        scoring_func="sqrtsoftplus",
        norm_topk_prob=True,
        engram_layer_ids=list(engram.layer_ids),
        engram_num_embeddings=list(engram.num_embeddings()),
        engram_max_ngram_size=engram.max_ngram_size,
        engram_n_heads=engram.n_heads,
        engram_head_dim=engram.head_dim,
        engram_compressed_vocab_size=token_map.compressed_vocab_size,
        engram_pad_token_id=engram.pad_token_id,
        engram_vocab_size=engram.vocab_size,
    )
    return keys


def write_checkpoint(
    directory: Path,
    state: dict[str, Tensor],
    config: Any,
    engram: EngramConfig,
    token_map: TokenMap,
    tokenizer: Any,
) -> int:
    """Write weights, config, generation config and tokenizer; return the weights' size in bytes."""
    directory.mkdir(parents=True, exist_ok=True)
    save_file(native_state(state), directory / WEIGHTS, metadata={"format": "pt"})
    _write_json(directory / "config.json", config_json(config, engram, token_map))
    generation = {
        "bos_token_id": config.bos_token_id,
        "eos_token_id": config.eos_token_id,
        "pad_token_id": config.pad_token_id,
        "do_sample": False,
        "temperature": 0.0,
    }
    _write_json(directory / "generation_config.json", generation)
    tokenizer.save_pretrained(directory)
    return (directory / WEIGHTS).stat().st_size


def read_weights(directory: Path, names: list[str]) -> dict[str, Tensor]:
    """Read a checkpoint directory back into a training ``state_dict`` (fp32)."""
    return training_state(load_file(directory / WEIGHTS), names)


def _write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
