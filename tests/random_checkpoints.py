"""Random DeepSeek-V4 checkpoints with any MoE knob: complete, loadable, DeepSeek's names, the bundled tokenizer.

Weights are scaled so that mistakes show: the logits are far from uniform, a tenth of the experts' pre-activations
passes the swiglu limit, the correction bias changes which experts are chosen, and every expert is used.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from v4_reference import build

from moeray.tiny import checkpoint_path, export
from moeray.tiny.engram import EngramConfig

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "generation_config.json")
# Smaller than the bundled model's: a random table needs no room for facts.
ENGRAM = EngramConfig(vocab_size=512)
# Of unit-variance tokens, a tenth of the pre-activations is then beyond the limit.
SWIGLU_LIMIT, PRE_ACTIVATION_STD = 2.0, 1.2


def write_random_checkpoint(
    directory: Path,
    *,
    seed: int = 0,
    dtype: str = "bfloat16",
    engram: bool = True,
    num_files: int = 1,
    **config_overrides: Any,
) -> Path:
    """Write config.json, tokenizer and weights of a random model of the bundled model's size.

    Args:
        directory: made if it does not exist.
        seed: of the weights.
        dtype: "bfloat16" or "float32", of everything that DeepSeek does not keep in fp32 anyway.
        engram: layers 1 and 2 have an Engram.
        num_files: 1 gives model.safetensors, more give shards with an index.
        config_overrides: keys of config.json, as DeepSeek writes them (`num_experts_per_tok=6`, `num_hash_layers=0`,
            `compress_ratios=[0, 4]`, `n_shared_experts=2`, ...); they win over everything.
    Returns:
        `directory`.
    """
    directory.mkdir(parents=True, exist_ok=True)
    for name in TOKENIZER_FILES:
        shutil.copy(checkpoint_path() / name, directory / name)
    config = _config(dtype, engram, config_overrides)
    (directory / "config.json").write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
    model = build(directory)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if name in model.state_dict():
                tensor.copy_(_draw(name, tensor, config["n_routed_experts"], generator))
    tensors = export.native_state(model.state_dict(), getattr(torch, dtype))
    _write_weights(directory, tensors, num_files)
    return directory


def _config(dtype: str, engram: bool, overrides: dict[str, Any]) -> dict[str, Any]:
    """The bundled model's config.json with these changes; lists per layer follow the number of layers."""
    config = json.loads((checkpoint_path() / "config.json").read_text(encoding="utf-8"))
    config |= {"dtype": dtype, "swiglu_limit": SWIGLU_LIMIT, "engram_vocab_size": ENGRAM.vocab_size}
    config |= {"engram_layer_ids": list(ENGRAM.layer_ids), "engram_num_embeddings": list(ENGRAM.num_embeddings())}
    if not engram:
        config = {key: value for key, value in config.items() if not key.startswith("engram_")}
    config |= overrides
    if "compress_ratios" in overrides:
        config["num_hidden_layers"] = len(overrides["compress_ratios"])
    return config


def _draw(name: str, like: Tensor, num_experts: int, generator: torch.Generator) -> Tensor:
    """Random values for one tensor of the training model."""
    normal = torch.randn(like.shape, generator=generator)
    fan_in = like.shape[-1] ** -0.5 if like.dim() else 1.0
    if name.endswith("tid2eid"):
        return torch.stack([torch.randperm(num_experts, generator=generator)[: like.shape[1]] for _ in like])
    if name.endswith(("norm.weight", "q_weight", "k_weight")):
        return 1 + 0.1 * normal
    if name.endswith("e_score_correction_bias"):
        return 0.3 * normal
    if name.endswith(("sinks", "position_bias")):
        return 0.5 * normal
    if name.endswith(("base", "scale")):
        return 0.3 * normal + (0.3 if name.endswith("scale") else 0.0)
    if name.endswith(("gate_up_proj", "shared_experts.gate_proj.weight", "shared_experts.up_proj.weight")):
        return PRE_ACTIVATION_STD * fan_in * normal
    if name.endswith("lm_head.weight"):
        return 2.5 * fan_in * normal
    if name.endswith(("embed_tokens.weight", "engram.embed.weight")):
        return normal
    return fan_in * normal


def _write_weights(directory: Path, tensors: dict[str, Tensor], num_files: int) -> None:
    if num_files == 1:
        save_file(tensors, directory / export.WEIGHTS, metadata={"format": "pt"})
        return
    weight_map: dict[str, str] = {}
    for index in range(num_files):
        file = f"model-{index + 1:05}-of-{num_files:05}.safetensors"
        part = dict(list(tensors.items())[index::num_files])
        save_file(part, directory / file, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(part, file))
    total = sum(tensor.nbytes for tensor in tensors.values())
    index_file = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index_file, indent=1), encoding="utf-8")
