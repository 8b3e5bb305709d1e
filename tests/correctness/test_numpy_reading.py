"""Experts and Engram of whole checkpoints, from their files to the numbers, against the plain numpy reading."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from expert_mathematics import relative_errors
from numpy_reading import NumpyCheckpoint
from random_checkpoints import write_random_checkpoint
from tokenizers import Tokenizer

from moeray.deepseek_v4.checkpoint import Checkpoint
from moeray.deepseek_v4.engram import EngramLayout, NgramHash, add_gated_value, build_token_map
from moeray.deepseek_v4.engram_table import EngramTable, table_name
from moeray.deepseek_v4.tensor_reader import TensorReader
from moeray.tiny import checkpoint_path

TOKENS = np.random.default_rng(5).integers(0, 2048, 200).tolist()


@pytest.fixture(scope="module", params=["bundled", "random"])
def directory(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    if request.param == "bundled":
        return checkpoint_path()
    return write_random_checkpoint(tmp_path_factory.mktemp("random"), seed=4, num_files=2)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 1e-2), (torch.float32, 1e-5)])
def test_every_expert_is_within_rounding_of_float64(directory: Path, dtype: torch.dtype, tolerance: float) -> None:
    errors = relative_errors(directory, dtype, num_tokens=2)
    assert len(errors) == 4 * 16 * 2, "every expert of every layer"
    assert max(errors) <= tolerance


def ngrams(directory: Path) -> NgramHash:
    checkpoint = Checkpoint.open(directory)
    layout = EngramLayout.from_config(SimpleNamespace(**checkpoint.config))
    assert layout is not None
    return NgramHash(
        layout, *build_token_map(Tokenizer.from_file(str(directory / "tokenizer.json")), checkpoint.shape.vocab_size)
    )


def test_row_indices_are_exact_from_the_tokenizer_on(directory: Path) -> None:
    before = np.full((1, 3), -1)
    rows = ngrams(directory).rows(np.array(TOKENS), np.array([0, len(TOKENS)]), before)
    assert rows.tolist() == NumpyCheckpoint(directory).engram_rows(TOKENS)


def test_the_token_map_is_that_of_a_plain_reading_of_unicode(directory: Path) -> None:
    mapped, size = build_token_map(Tokenizer.from_file(str(directory / "tokenizer.json")), 2048)
    assert mapped.tolist() == NumpyCheckpoint(directory).compressed_ids
    assert size == max(mapped) + 1 < 2048


def test_the_gated_streams_are_those_of_the_published_mathematics(directory: Path) -> None:
    reading, checkpoint = NumpyCheckpoint(directory), Checkpoint.open(directory)
    layout = ngrams(directory).layout
    rows = reading.engram_rows(TOKENS[:12])
    streams_THD = np.random.default_rng(6).normal(size=(12, 4, checkpoint.shape.hidden_size))
    for index, layer in enumerate(layout.layer_ids):
        table = EngramTable(checkpoint.matrix(table_name(layer)), (layout.num_rows[index], layout.head_dim))
        names = [f"layers.{layer}.engram.{part}" for part in ("wkv.weight", "q_weight", "k_weight")]
        with TensorReader() as reader:
            wkv, q_HD, k_HD = (reader.read([checkpoint.tensors[name]]).float() for name in names)
        kv = torch.nn.functional.linear(table.gather(np.array(rows[index])).float(), wkv)
        got = add_gated_value(torch.from_numpy(streams_THD).float(), kv, q_HD, k_HD, reading.config["rms_norm_eps"])
        want = reading.engram(layer, streams_THD, rows[index])
        assert np.abs(got.numpy() - want).max() < 1e-5 * np.abs(want).max()
        assert np.abs(want - streams_THD).max() > 0.1, "the gate opens on these inputs"
