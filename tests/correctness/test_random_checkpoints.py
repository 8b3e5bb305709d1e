"""Random checkpoints are what the tests that use them believe."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from knobs import MATRIX, Knobs
from numpy_reading import NumpyCheckpoint
from random_checkpoints import write_random_checkpoint
from v4_reference import load, teacher_forced

from moeray.deepseek_v4 import Checkpoint, RoutedExperts
from moeray.vllm_hooks.served_model import describe_model


@pytest.mark.parametrize("knobs", MATRIX, ids=str)
def test_every_knob_makes_a_checkpoint_that_opens_and_says_so(knobs: Knobs, tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(write_random_checkpoint(tmp_path, **knobs.changes))
    for key, attribute in (("num_experts_per_tok", "top_k"), ("n_shared_experts", "num_shared_experts")):
        if key in knobs.changes:
            assert getattr(checkpoint.shape, attribute) == knobs.changes[key]
    assert len(checkpoint.weight_files) == knobs.changes.get("num_files", 1)
    assert bool(checkpoint.shape.engram_layers) == knobs.changes.get("engram", True)


def test_the_seed_alone_decides_the_weights(tmp_path: Path) -> None:
    first, again, split, other = (
        load(write_random_checkpoint(tmp_path / str(index), seed=seed, num_files=files)).state_dict()
        for index, (seed, files) in enumerate([(1, 1), (1, 1), (1, 4), (2, 1)])
    )
    assert all(torch.equal(first[name], again[name]) and torch.equal(first[name], split[name]) for name in first)
    assert not torch.equal(first["lm_head.weight"], other["lm_head.weight"])


def test_the_limit_is_reached_the_bias_chooses_and_the_logits_are_not_flat(tmp_path: Path) -> None:
    directory = write_random_checkpoint(tmp_path)
    reading, model = NumpyCheckpoint(directory), load(directory)
    w1 = reading.tensor("layers.2.ffn.experts.3.w1.weight")
    gates = w1 @ np.random.default_rng(0).normal(size=(w1.shape[1], 200))
    assert 0.03 < (np.abs(gates) > reading.config["swiglu_limit"]).mean() < 0.3
    assert reading.tensor("layers.2.ffn.gate.bias").std() > 0.1
    prompt = np.random.default_rng(1).integers(10, 1500, 100).tolist()
    best = teacher_forced(model, prompt).best_T
    assert len(best.unique()) > 30, "not the same token everywhere"
    with torch.no_grad():
        model.lm_head.weight.zero_()
    flat = teacher_forced(model, prompt).chosen_T
    assert flat.std() < 1e-3 < 1 < teacher_forced(load(directory), prompt).chosen_T.std()


def test_group_and_shard_compute_a_float32_checkpoint_in_the_same_16_bits(tmp_path: Path) -> None:
    directory = write_random_checkpoint(tmp_path, dtype="float32")
    checkpoint = Checkpoint.open(directory)
    assert checkpoint.tensors["layers.0.ffn.experts.0.w1.weight"].dtype == "F32"
    assert checkpoint.shape.dtype == describe_model(directory).dtype == "bfloat16"
    experts = RoutedExperts.load(checkpoint, {0: [0]})
    rows = experts(0, torch.ones(1, checkpoint.shape.hidden_size).bfloat16(), torch.zeros(1, 1, dtype=torch.int32))
    assert rows.dtype == torch.bfloat16
