"""A small random checkpoint with DeepSeek's names, written as one file or in shards."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

NUM_LAYERS, NUM_EXPERTS, HIDDEN, WIDTH = 3, 6, 48, 20
CONFIG: dict[str, Any] = {
    "model_type": "deepseek_v4",
    "architectures": ["DeepseekV4ForCausalLM"],
    "num_hidden_layers": NUM_LAYERS,
    "hidden_size": HIDDEN,
    "vocab_size": 32,
    "n_routed_experts": NUM_EXPERTS,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": WIDTH,
    "swiglu_limit": 1.5,
    "num_hash_layers": 1,
    "engram_layer_ids": [1],
    "dtype": "bfloat16",
}

Write = Callable[..., Path]


def random_tensors(dtype: torch.dtype = torch.bfloat16) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(7)

    def normal(*shape: int) -> Tensor:
        return (torch.randn(shape, generator=generator) * 0.5).to(dtype)

    tensors = {"embed.weight": normal(32, HIDDEN)}
    for layer in range(NUM_LAYERS):
        tensors[f"layers.{layer}.ffn.gate.weight"] = normal(NUM_EXPERTS, HIDDEN)
        for expert in range(NUM_EXPERTS):
            prefix = f"layers.{layer}.ffn.experts.{expert}"
            tensors[f"{prefix}.w1.weight"] = normal(WIDTH, HIDDEN)
            tensors[f"{prefix}.w2.weight"] = normal(HIDDEN, WIDTH)
            tensors[f"{prefix}.w3.weight"] = normal(WIDTH, HIDDEN)
    return tensors


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """write(tensors, num_shards=1, name="checkpoint", **config changes) -> directory."""

    def _write(
        tensors: dict[str, Tensor] | None = None, num_shards: int = 1, name: str = "checkpoint", **changes: Any
    ) -> Path:
        tensors = random_tensors() if tensors is None else tensors
        directory = tmp_path / name
        directory.mkdir()
        config = {key: value for key, value in {**CONFIG, **changes}.items() if value is not ...}
        (directory / "config.json").write_text(json.dumps(config))
        if num_shards == 1:
            save_file(tensors, directory / "model.safetensors")
            return directory
        weight_map = {}
        for shard in range(num_shards):
            file = f"model-{shard + 1:05}-of-{num_shards:05}.safetensors"
            part = {key: tensors[key] for index, key in enumerate(tensors) if index % num_shards == shard}
            save_file(part, directory / file)
            weight_map.update(dict.fromkeys(part, file))
        index = {"metadata": {}, "weight_map": weight_map}
        (directory / "model.safetensors.index.json").write_text(json.dumps(index))
        return directory

    return _write
