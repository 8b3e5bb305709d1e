"""The larger bench model is a checkpoint like any other."""

from __future__ import annotations

import json
from pathlib import Path

import bench_model
import torch
from safetensors.torch import load_file

from moeray.deepseek_v4 import Checkpoint, RoutedExperts

SMALL = {
    "hidden_size": 64, "moe_intermediate_size": 32, "num_hidden_layers": 2, "n_routed_experts": 8,
    "num_experts_per_tok": 3, "compress_ratios": [0, 4],
}  # fmt: skip


def test_the_shape_is_the_one_that_the_documents_name() -> None:
    config = bench_model.config_json()
    shape = (config["hidden_size"], config["num_hidden_layers"], config["n_routed_experts"])
    assert shape == (1024, 8, 64)
    assert (config["num_experts_per_tok"], config["moe_intermediate_size"]) == (6, 512)
    assert len(config["compress_ratios"]) == config["num_hidden_layers"]
    assert not [key for key in config if key.startswith("engram")]


def test_a_written_checkpoint_opens_and_its_experts_load(tmp_path: Path) -> None:
    directory = tmp_path / "model"
    bench_model.write(directory, bench_model.config_json() | SMALL)
    checkpoint = Checkpoint.open(directory)
    assert (checkpoint.shape.hidden_size, checkpoint.shape.num_experts, checkpoint.shape.top_k) == (64, 8, 3)
    held = dict.fromkeys(checkpoint.shape.moe_layers, tuple(range(8)))
    experts = RoutedExperts.load(checkpoint, held)
    ids_TK = torch.tensor([[0, 3, 7], [1, 2, 5]], dtype=torch.int32)
    rows_PD = experts(1, torch.randn(2, 64).bfloat16(), ids_TK)
    assert rows_PD.shape == (6, 64)
    assert rows_PD.abs().max() > 0


def test_hash_layers_send_a_token_to_different_experts(tmp_path: Path) -> None:
    directory = tmp_path / "model"
    bench_model.write(directory, bench_model.config_json() | SMALL)
    tables = [value for name, value in load_file(directory / "model.safetensors").items() if name.endswith("tid2eid")]
    assert tables
    for table in tables:
        assert all(len(set(row)) == len(row) for row in table.tolist())
        assert set(table.flatten().tolist()) == set(range(8))


def test_a_checkpoint_that_is_there_is_not_written_again(tmp_path: Path) -> None:
    (tmp_path / bench_model.NAME).mkdir()
    (tmp_path / bench_model.NAME / "config.json").write_text(json.dumps(bench_model.config_json()), encoding="utf-8")
    assert bench_model.large_checkpoint(tmp_path) == tmp_path / bench_model.NAME
    assert not (tmp_path / bench_model.NAME / "model.safetensors").exists()
