"""`moeray inspect` says what a checkpoint holds, and by its exit status whether it fits."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from published_checkpoints import V4_FLASH, V41_FLASH, write_published

from moeray.cli.commands import main
from moeray.deepseek_v4.quantise import quantise_checkpoint
from moeray.tiny import checkpoint_path

WHOLE = sum(file.stat().st_size for file in checkpoint_path().glob("*.safetensors"))


def test_the_bundled_model_fits_and_its_bytes_are_sorted_by_role(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", "moeray-tiny"]) == 0
    text = capsys.readouterr().out
    assert "DeepseekV4ForCausalLM (deepseek_v4): 4 layers, hidden 128" in text
    assert "16 of width 64, top-2, 1 shared; 4 MoE layers, 2 of them hash-routed; swiglu limit 10" in text
    assert "Engram: layers 1, 2" in text
    assert "BF16" in text
    assert "fits, within the limits of this version:\n    Engram in DeepseekV4ForCausalLM runs on CPU only" in text


def test_json_has_the_same_facts_for_scripts(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", "moeray-tiny", "--json", "--groups", "3", "--redundant", "2"]) == 0
    facts = json.loads(capsys.readouterr().out)
    routed = facts["roles"]["routed experts"]
    assert routed["num_bytes"] == 4 * 16 * 3 * 64 * 128 * 2
    assert routed["formats"] == {"BF16": routed["num_bytes"]}
    assert facts["num_bytes"] < WHOLE
    assert WHOLE - facts["num_bytes"] < 100_000, "only the header is no tensor's"
    assert [group["num_experts"] for group in facts["groups"]] == [4 * 6, 4 * 6, 4 * 6]
    assert sum(group["num_bytes"] for group in facts["groups"]) == routed["num_bytes"] * 18 // 16


def test_what_does_not_fit_is_listed_and_makes_the_status_1(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    directory = write_published(tmp_path, {**V4_FLASH, "num_hidden_layers": 4})
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**config, "moe_intermediate_size": 1024}))
    assert main(["inspect", str(directory)]) == 1
    text = capsys.readouterr().out
    assert "layers.0.ffn.experts.0.w1.weight has shape [2048, 4096], config.json asks for [1024, 4096]" in text
    assert f"and {4 * 256 * 3 - 20} more" in text


def test_a_shape_outside_vllms_cpu_kernels_is_told_as_that(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    directory = write_published(tmp_path, {**V4_FLASH, "num_hidden_layers": 1, "head_dim": 256})
    assert main(["inspect", str(directory)]) == 0
    assert "head_dim is 256: vLLM's CPU kernels for V4 have 512" in capsys.readouterr().out


def test_what_the_cluster_would_refuse_is_told_beforehand(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    directory = write_published(tmp_path, V41_FLASH)
    assert main(["inspect", str(directory), "--json"]) == 0
    gpu, split = json.loads(capsys.readouterr().out)["limits"]
    assert "DeepseekV41ForCausalLM on GPUs only" in gpu
    assert "cannot leave the attention shard" in split


def test_many_problems_are_counted_and_not_a_crash(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Blocks of another size than config.json says, in every matrix of the shard."""
    directory = quantise_checkpoint(checkpoint_path(), tmp_path / "quantised")
    config = json.loads((directory / "config.json").read_text())
    config["quantization_config"]["weight_block_size"] = [32, 32]
    (directory / "config.json").write_text(json.dumps(config))
    assert main(["inspect", str(directory)]) == 1
    assert "more" in capsys.readouterr().out.splitlines()[-1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([""], "'' is neither a bundled model"),
        (["./nowhere"], "'./nowhere' is neither a bundled model"),
        (["moeray-tiny", "--groups", "17"], "16 experts cannot be spread over 17 expert groups"),
        (["moeray-tiny", "--groups", "2", "--redundant", "17"], "17 redundant copies of 16 experts do not fit"),
    ],
)
def test_a_wrong_question_gets_one_line_and_status_2(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["inspect", *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_a_missing_tokenizer_is_a_problem(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    directory = write_published(tmp_path, {**V4_FLASH, "num_hidden_layers": 1})
    (directory / "tokenizer.json").unlink()
    assert main(["inspect", str(directory)]) == 1
    assert f"{directory / 'tokenizer.json'}: is missing" in capsys.readouterr().out
