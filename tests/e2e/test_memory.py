"""What the split frees: a shard's memory does not grow with the routed experts, the groups' does."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import psutil
import pytest
import torch
from clusters import Cluster, cluster
from safetensors.torch import load_file, save_file

from moeray.tiny import checkpoint_path

WIDTH = 6144
EXPERT_BYTES = 4 * 16 * 3 * 128 * WIDTH * 2
"""4 layers x 16 experts x 3 matrices of 128 x WIDTH in bf16: 302 MB, far above the noise of a process' size."""


def widened(folder: Path) -> Path:
    """moeray-tiny with experts WIDTH wide (random weights: only its size matters)."""
    shutil.copytree(checkpoint_path(), folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"moe_intermediate_size": WIDTH}))
    tensors = load_file(folder / "model.safetensors")
    for name, tensor in tensors.items():
        if match := re.search(r"\.ffn\.(experts\.\d+|shared_experts)\.(w[123])\.weight", name):
            shape = (tensor.shape[0], WIDTH) if match[2] == "w2" else (WIDTH, tensor.shape[1])
            tensors[name] = torch.randn(shape, dtype=torch.bfloat16) * 0.01
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def engine_bytes(running: Cluster) -> int:
    """Resident memory of the (only) shard's EngineCore after it has answered."""
    status, answer = running.post("/v1/completions", {"model": "wide", "prompt": "What is", "max_tokens": 8})
    assert status == 200, answer
    (shard,) = running.processes("attention_shard")
    return psutil.Process(shard["engine_pid"]).memory_info().rss


@pytest.mark.full
def test_a_shards_memory_lacks_the_routed_experts_and_each_group_holds_its_half(tmp_path: Path) -> None:
    model = str(widened(tmp_path / "wide"))
    one = {"model": model, "attention": {"num_shards": 1}}
    with cluster(one | {"experts": {"num_groups": 2}}) as running:
        split = engine_bytes(running)
        groups = running.processes("expert_group")
        resident = [psutil.Process(group["pid"]).memory_info().rss for group in groups]
        held = [group["experts"]["bytes"] for group in groups]
    with cluster(one | {"transport": {"backend": "local"}}) as running:
        whole = engine_bytes(running)
    assert held == [EXPERT_BYTES // 2] * 2
    assert whole - split > 0.9 * EXPERT_BYTES, f"{whole >> 20} MiB with experts, {split >> 20} MiB without"
    assert all(size > EXPERT_BYTES // 2 for size in resident)
