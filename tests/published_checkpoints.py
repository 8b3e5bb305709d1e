"""Checkpoints of the published shapes without their bytes: true config.json, headers and index over sparse files.

A reader of headers cannot tell them from real ones; reading a weight gives zeros. Shapes: DeepSeek-V4-Flash, V4-Pro,
V4.1-Flash, and a model of 10^12 parameters with top-16 routing and Engram on a V4 body, which nobody has published.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

Tensor = tuple[str, str, tuple[int, ...]]  # name, dtype, shape
ITEM_BYTES = {"BF16": 2, "F32": 4, "I64": 8, "F8_E4M3": 1, "F8_E8M0": 1, "I8": 1}
FILE_BYTES = 5 << 30


def _v4(
    *, layers: int, hidden: int, heads: int, q_lora: int, o_groups: int, experts: int, width: int
) -> dict[str, Any]:
    return {
        "architectures": ["DeepseekV4ForCausalLM"],
        "model_type": "deepseek_v4",
        "torch_dtype": "bfloat16",
        "vocab_size": 129280,
        "num_hidden_layers": layers,
        "hidden_size": hidden,
        "num_attention_heads": heads,
        "num_key_value_heads": 1,
        "head_dim": 512,
        "qk_rope_head_dim": 64,
        "q_lora_rank": q_lora,
        "o_lora_rank": 1024,
        "o_groups": o_groups,
        "sliding_window": 128,
        "compress_ratios": [0, *([4, 128] * layers)][:layers],
        "index_n_heads": 64,
        "index_head_dim": 128,
        "index_topk": 512,
        "n_routed_experts": experts,
        "n_shared_experts": 1,
        "num_experts_per_tok": 6,
        "moe_intermediate_size": width,
        "num_hash_layers": 3,
        "scoring_func": "sqrtsoftplus",
        "topk_method": "noaux_tc",
        "routed_scaling_factor": 1.5,
        "swiglu_limit": 10.0,
        "hc_mult": 4,
        "hc_sinkhorn_iters": 20,
        "num_nextn_predict_layers": 1,
        "expert_dtype": "fp4",
        "quantization_config": {
            "quant_method": "fp8",
            "fmt": "e4m3",
            "activation_scheme": "dynamic",
            "scale_fmt": "ue8m0",
            "weight_block_size": [128, 128],
        },
    }


V4_FLASH = _v4(layers=43, hidden=4096, heads=64, q_lora=1024, o_groups=8, experts=256, width=2048)
V4_PRO = _v4(layers=61, hidden=7168, heads=128, q_lora=1536, o_groups=16, experts=384, width=3072)
_FLASH_41 = {
    **_v4(layers=40, hidden=5120, heads=64, q_lora=1280, o_groups=8, experts=384, width=2304),
    "num_hash_layers": 0,
    "compress_ratios": [0, *([1, 2] * 20)][:40],
    "num_nextn_predict_layers": 0,
    "engram_layer_ids": [1, 14],
    "engram_head_dim": 256,
    "engram_n_heads": 8,
    "engram_max_ngram_size": 3,
    "engram_num_embeddings": [383_000_000, 383_000_000],
}
V41_FLASH = {
    "architectures": ["DeepseekV41ForCausalLM"],
    "model_type": "deepseek_v41",
    "text_config": {
        **_FLASH_41,
        "quantization_config": {**_FLASH_41["quantization_config"], "weight_block_size": [32, 32]},
    },
    "vision_config": {"num_hidden_layers": 0},
}
TRILLION = {
    **_v4(layers=64, hidden=6144, heads=96, q_lora=1536, o_groups=8, experts=512, width=1600),
    "num_experts_per_tok": 16,
    "engram_layer_ids": [1, 14],
    "engram_head_dim": 256,
    "engram_n_heads": 8,
    "engram_max_ngram_size": 3,
    "engram_num_embeddings": [383_000_000, 383_000_000],
}
CONFIGS = {"V4-Flash": V4_FLASH, "V4-Pro": V4_PRO, "V4.1-Flash": V41_FLASH, "1T": TRILLION}


def tensors(config: dict[str, Any]) -> Iterator[Tensor]:
    """Every tensor of a published checkpoint of this config, in the order of its files."""
    text = config.get("text_config", config)
    hidden = text["hidden_size"]
    block = text["quantization_config"]["weight_block_size"][0]
    yield "embed.weight", "BF16", (text["vocab_size"], hidden)
    for layer in range(text["num_hidden_layers"]):
        yield from _layer(f"layers.{layer}", text, layer, block)
    for draft in range(text["num_nextn_predict_layers"]):
        yield from _layer(f"mtp.{draft}", text, text["num_hidden_layers"], block)
    yield "norm.weight", "BF16", (hidden,)
    yield "head.weight", "BF16", (text["vocab_size"], hidden)
    yield "hc_head_fn", "F32", (4, 4 * hidden)


def _layer(name: str, text: dict[str, Any], layer: int, block: int) -> Iterator[Tensor]:
    hidden, heads = text["hidden_size"], text["num_attention_heads"]
    groups, o_lora, q_lora, width = (
        text[key] for key in ("o_groups", "o_lora_rank", "q_lora_rank", "moe_intermediate_size")
    )
    for part, rows, columns in (
        ("wq_a", q_lora, hidden),
        ("wq_b", heads * 512, q_lora),
        ("wkv", 512, hidden),
        ("wo_a", groups * o_lora, heads * 512 // groups),
        ("wo_b", hidden, groups * o_lora),
    ):
        yield from _fp8(f"{name}.attn.{part}", rows, columns, block)
    yield f"{name}.attn.attn_sink", "F32", (heads,)
    yield f"{name}.attn_norm.weight", "BF16", (hidden,)
    yield f"{name}.hc_attn_fn", "F32", (24, 4 * hidden)
    if layer < text["num_hash_layers"]:
        yield f"{name}.ffn.gate.tid2eid", "I64", (text["vocab_size"], text["num_experts_per_tok"])
    else:
        yield f"{name}.ffn.gate.bias", "F32", (text["n_routed_experts"],)
    yield f"{name}.ffn.gate.weight", "BF16", (text["n_routed_experts"], hidden)
    for part, rows, columns in (("w1", width, hidden), ("w2", hidden, width), ("w3", width, hidden)):
        yield from _fp8(f"{name}.ffn.shared_experts.{part}", rows, columns, block)
    for expert in range(text["n_routed_experts"]):
        for part, rows, columns in (("w1", width, hidden), ("w2", hidden, width), ("w3", width, hidden)):
            yield f"{name}.ffn.experts.{expert}.{part}.weight", "I8", (rows, columns // 2)
            yield f"{name}.ffn.experts.{expert}.{part}.scale", "F8_E8M0", (rows, columns // 32)
    if layer in text.get("engram_layer_ids", ()) and name.startswith("layers"):
        rows = text["engram_num_embeddings"][text["engram_layer_ids"].index(layer)]
        dim, columns = text["engram_head_dim"], (text["engram_max_ngram_size"] - 1) * text["engram_n_heads"]
        yield f"{name}.engram.embed.weight", "F8_E4M3", (rows, dim)
        yield f"{name}.engram.embed.scale", "F8_E8M0", (rows, dim // 32)
        yield from _fp8(f"{name}.engram.wkv", 5 * hidden, columns * dim, block)


def _fp8(name: str, rows: int, columns: int, block: int) -> Iterator[Tensor]:
    yield f"{name}.weight", "F8_E4M3", (rows, columns)
    yield f"{name}.scale", "F8_E8M0", (math.ceil(rows / block), math.ceil(columns / block))


def num_bytes(tensor: Tensor) -> int:
    return math.prod(tensor[2]) * ITEM_BYTES[tensor[1]]


def write_published(directory: Path, config: dict[str, Any]) -> Path:
    """Write config.json, an index and sparse weight files of about 5 GiB each; takes no space worth mentioning."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config))
    (directory / "tokenizer.json").write_text("{}")
    files: list[list[Tensor]] = [[]]
    filled = 0
    for tensor in tensors(config):
        if filled > FILE_BYTES:
            files.append([])
            filled = 0
        files[-1].append(tensor)
        filled += num_bytes(tensor)
    weight_map = {}
    for number, content in enumerate(files):
        name = f"model-{number + 1:05}-of-{len(files):05}.safetensors"
        _write_sparse(directory / name, content)
        weight_map.update(dict.fromkeys((tensor[0] for tensor in content), name))
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return directory


def _write_sparse(file: Path, content: list[Tensor]) -> None:
    header, offset = {}, 0
    for tensor in content:
        name, dtype, shape = tensor
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [offset, offset + num_bytes(tensor)]}
        offset += num_bytes(tensor)
    text = json.dumps(header).encode()
    with file.open("wb") as stream:
        stream.write(struct.pack("<Q", len(text)) + text)
        stream.truncate(8 + len(text) + offset)
