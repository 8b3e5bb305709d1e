"""The larger model of the step benchmark: random weights of a shape that a real model could have, one group's worth.

hidden 1024, 8 layers, 64 experts top-6 of width 512, one shared expert, no Engram: 0.8 G parameters in routed experts,
1.6 GB in bf16. Written once into build/, with the bundled model's tokenizer. The text it makes means nothing; what is
timed depends on shapes, and on routing, which random weights spread evenly.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import records
import torch
from safetensors.torch import save_file
from torch import Tensor

from moeray.tiny import checkpoint_path, export

NAME = "bench-large"
SHAPE: dict[str, Any] = {
    "hidden_size": 1024, "moe_intermediate_size": 512, "num_hidden_layers": 8, "num_attention_heads": 8,
    "q_lora_rank": 128, "o_lora_rank": 64, "num_experts_per_tok": 6, "n_routed_experts": 64, "index_n_heads": 8,
    "compress_ratios": [128, 0, 4, 128, 0, 4, 0, 4],
}  # fmt: skip
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "generation_config.json")
NOISE_VALUES = 1 << 22


def large_checkpoint(folder: Path = records.ROOT / "build") -> Path:
    """The checkpoint's directory; writes it if it is not there (ten seconds)."""
    directory = folder / NAME
    config = config_json()
    if directory.exists() and json.loads((directory / "config.json").read_text(encoding="utf-8")) == config:
        return directory
    folder.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as unfinished:
        write(Path(unfinished) / NAME, config)
        shutil.rmtree(directory, ignore_errors=True)
        (Path(unfinished) / NAME).rename(directory)
    return directory


def config_json() -> dict[str, Any]:
    """The bundled model's configuration in the larger shape."""
    config = json.loads((checkpoint_path() / "config.json").read_text(encoding="utf-8"))
    return {key: value for key, value in config.items() if not key.startswith("engram_")} | SHAPE


def write(directory: Path, config: dict[str, Any]) -> None:
    """A whole checkpoint: configuration, tokenizer, weights under DeepSeek's names."""
    directory.mkdir()
    for name in TOKENIZER_FILES:
        shutil.copy(checkpoint_path() / name, directory / name)
    (directory / "config.json").write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
    noise = torch.randn(NOISE_VALUES, generator=torch.Generator().manual_seed(0))
    tensors = {
        name: _values(name, like, noise, number * 7919, config) for number, (name, like) in enumerate(_shapes(config))
    }
    save_file(tensors, directory / export.WEIGHTS, metadata={"format": "pt"})


def _shapes(config: dict[str, Any]) -> list[tuple[str, Tensor]]:
    """Every tensor of the checkpoint, without values."""
    from transformers import DeepseekV4Config, DeepseekV4ForCausalLM

    with torch.device("meta"):
        model = DeepseekV4ForCausalLM(DeepseekV4Config(**{k: v for k, v in config.items() if k != "dtype"}))
    return list(export.native_state(model.state_dict()).items())


def _values(name: str, like: Tensor, noise: Tensor, begin: int, config: dict[str, Any]) -> Tensor:
    if name.endswith("tid2eid"):
        token, choice = torch.arange(like.shape[0]).unsqueeze(1), torch.arange(like.shape[1])
        experts: Tensor = (token * 5 + choice * 11) % config["n_routed_experts"]
        return experts
    if name.endswith("norm.weight"):
        return torch.ones(like.shape, dtype=like.dtype)
    scale = like.shape[-1] ** -0.5 if like.dim() >= 2 else 0.3
    scale *= {"embed.weight": like.shape[-1] ** 0.5, "head.weight": 3.0}.get(name, 1.5)
    start = begin % len(noise)
    repeated = torch.cat([noise[start:], noise[:start]])
    count = -(-like.numel() // len(noise))
    values: Tensor = repeated.repeat(count)[: like.numel()] * scale
    return values.to(like.dtype).view(like.shape)
