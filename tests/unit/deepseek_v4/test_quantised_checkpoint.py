"""A checkpoint in the published format: only a group's bytes are read, and they become exactly what they stand for."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers.integrations.finegrained_fp8 import Fp8Dequantize

from moeray.deepseek_v4 import Checkpoint, CheckpointError, RoutedExperts
from moeray.deepseek_v4.quantise import LIKE, quantise_checkpoint
from moeray.tiny import checkpoint_path

PARTS = ("w1", "w2", "w3")


@pytest.fixture(scope="module", params=LIKE)
def published(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """The bundled model in each of the published formats."""
    directory = tmp_path_factory.mktemp("published") / "checkpoint"
    return Checkpoint.open(quantise_checkpoint(checkpoint_path(), directory, request.param))


@pytest.fixture(scope="module")
def quantised(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """As V4 is published: FP4 experts, FP8 matrices."""
    return Checkpoint.open(quantise_checkpoint(checkpoint_path(), tmp_path_factory.mktemp("quantised") / "checkpoint"))


def reference(checkpoint: Checkpoint, layer: int, expert: int) -> dict[str, Tensor]:
    """The expert's matrices as safetensors reads and transformers dequantises them."""
    stored = load_file(checkpoint.path / "model.safetensors")
    name = f"layers.{layer}.ffn.experts.{expert}"
    convert = Fp8Dequantize(SimpleNamespace())._dequantize_one
    return {
        part: convert(stored[f"{name}.{part}.weight"], stored[f"{name}.{part}.scale"], torch.bfloat16) for part in PARTS
    }


@pytest.mark.parametrize(
    ("like", "experts", "others", "tables"),
    [
        ("v4", "FP4 1x32 E8M0", "FP8 128x128 E8M0", "BF16"),
        ("v4-base", "FP8 128x128 F32", "FP8 128x128 F32", "BF16"),
        ("v4.1", "FP4 1x32 E8M0", "FP8 32x32 E8M0", "FP8 1x32 E8M0"),
    ],
)
def test_each_copy_has_the_published_formats_and_names(
    like: str, experts: str, others: str, tables: str, tmp_path: Path
) -> None:
    copy = Checkpoint.open(quantise_checkpoint(checkpoint_path(), tmp_path / "copy", like))
    formats = {name: copy.matrix(name).format for name in copy.tensors if name.endswith(".weight")}
    assert formats["layers.3.ffn.experts.7.w2.weight"] == experts
    assert formats["layers.3.ffn.shared_experts.w2.weight"] == formats["layers.0.attn.wq_b.weight"] == others
    assert formats["layers.1.engram.embed.weight"] == tables
    assert formats["embed.weight"] == formats["layers.2.ffn.gate.weight"] == "BF16"


def test_loaded_experts_are_transformers_values_bit_for_bit(published: Checkpoint) -> None:
    experts = RoutedExperts.load(published, {0: (0, 9), 3: (15,)})
    for layer, expert in ((0, 0), (0, 9), (3, 15)):
        expected = reference(published, layer, expert)
        loaded = experts.weights(layer, expert)
        assert loaded.w13.dtype == loaded.w2.dtype == torch.bfloat16
        assert torch.equal(loaded.w13, torch.cat((expected["w1"], expected["w3"])))
        assert torch.equal(loaded.w2, expected["w2"])


def test_groups_read_the_experts_bytes_between_them_and_nothing_else(quantised: Checkpoint) -> None:
    groups = [RoutedExperts.load(quantised, dict.fromkeys(range(4), experts)) for experts in (range(5), range(5, 16))]
    names = [name for name in quantised.tensors if quantised.is_routed_expert(name)]
    assert len(names) == 4 * 16 * 3 * 2
    assert sum(group.bytes_read for group in groups) == quantised.bytes_of(names)
    one = 3 * 64 * 128 // 2 + 3 * 64 * 128 // 32
    assert [group.bytes_read for group in groups] == [4 * 5 * one, 4 * 11 * one]


def test_fp32_rows_of_quantised_experts_are_those_of_their_values(quantised: Checkpoint) -> None:
    experts = RoutedExperts.load(quantised, {2: (4,)}, dtype=torch.float32)
    weights = {part: value.double() for part, value in reference(quantised, 2, 4).items()}
    x_TD = torch.randn(5, 128, generator=torch.Generator().manual_seed(0)) * 8
    gate, up = (x_TD.double() @ weights[part].T for part in ("w1", "w3"))
    expected = (torch.nn.functional.silu(gate.clamp(max=10)) * up.clamp(-10, 10)) @ weights["w2"].T
    got = experts(2, x_TD, torch.full((5, 1), 4, dtype=torch.int32))
    assert (got.double() - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_an_expert_whose_scales_are_missing_is_refused_by_name(quantised: Checkpoint, tmp_path: Path) -> None:
    tensors = load_file(quantised.path / "model.safetensors")
    del tensors["layers.1.ffn.experts.3.w2.scale"]
    (tmp_path / "config.json").write_bytes((quantised.path / "config.json").read_bytes())
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(
        CheckpointError, match=r"layers\.1\.ffn\.experts\.3\.w2\.weight is stored as I8 and has no scales"
    ):
        Checkpoint.open(tmp_path)


def test_a_quantised_checkpoint_is_not_quantised_again(quantised: Checkpoint, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="is quantised already"):
        quantise_checkpoint(quantised.path, tmp_path / "again")


def test_the_fingerprint_tells_the_copy_from_the_original(quantised: Checkpoint) -> None:
    assert quantised.fingerprint() != Checkpoint.open(checkpoint_path()).fingerprint()
