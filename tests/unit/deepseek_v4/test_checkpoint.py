"""A checkpoint is either usable as a whole, or refused with the file, the numbers and what to do."""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from moeray.deepseek_v4 import Checkpoint, CheckpointError
from moeray.deepseek_v4 import checkpoint as checkpoint_module

Write = Callable[..., Path]
EXPERT = "layers.1.ffn.experts.2.w1.weight"


def edit_config(directory: Path, **changes: Any) -> None:
    file = directory / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def test_the_shape_is_what_config_and_weights_say(write: Write) -> None:
    shape = Checkpoint.open(write()).shape
    assert (shape.num_layers, shape.hidden_size, shape.num_experts, shape.top_k) == (3, 48, 6, 2)
    assert (shape.intermediate_size, shape.swiglu_limit, shape.dtype) == (20, 1.5, "bfloat16")
    assert (shape.moe_layers, shape.hash_layers, shape.engram_layers) == ((0, 1, 2), (0,), (1,))


@pytest.mark.parametrize("num_shards", [1, 3])
def test_the_index_places_every_tensor_where_safetensors_reads_it(write: Write, num_shards: int) -> None:
    checkpoint = Checkpoint.open(write(num_shards=num_shards))
    assert len(checkpoint.tensors) == 1 + 3 * (1 + 6 * 3)
    for name, place in checkpoint.tensors.items():
        with safe_open(place.file, "pt") as stored:
            tensor = stored.get_tensor(name)
        raw = place.file.read_bytes()[place.offset : place.offset + place.num_bytes]
        assert raw == tensor.view(torch.uint8).numpy().tobytes()
        assert place.shape == tuple(tensor.shape)
    names = ["embed.weight", EXPERT]
    assert checkpoint.bytes_of(names) == 2 * (32 * 48 + 20 * 48)


def test_a_missing_weight_file_is_named(write: Write) -> None:
    directory = write(num_shards=3)
    (directory / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(
        CheckpointError, match=r"model-00002-of-00003.safetensors: the weight file is missing; download"
    ):
        Checkpoint.open(directory)


@pytest.mark.parametrize("num_shards", [1, 2])
@pytest.mark.parametrize("cut", [1, 5000])
def test_a_truncated_weight_file_is_named_with_both_sizes(write: Write, num_shards: int, cut: int) -> None:
    directory = write(num_shards=num_shards)
    file = sorted(directory.glob("*.safetensors"))[-1]
    size = file.stat().st_size
    os.truncate(file, size - cut)
    with pytest.raises(CheckpointError, match=f"{file.name}: is truncated: {size} bytes expected, {size - cut} found"):
        Checkpoint.open(directory)


@pytest.mark.parametrize("size", [0, 4, 8, 300])
def test_a_file_cut_inside_its_header_is_refused(write: Write, size: int) -> None:
    directory = write()
    os.truncate(directory / "model.safetensors", size)
    with pytest.raises(CheckpointError, match=rf"model.safetensors: .*{size} found; download"):
        Checkpoint.open(directory)


def test_a_file_with_extra_bytes_is_refused(write: Write) -> None:
    directory = write()
    with (directory / "model.safetensors").open("ab") as stream:
        stream.write(b"junk")
    with pytest.raises(CheckpointError, match="is too long"):
        Checkpoint.open(directory)


@pytest.mark.parametrize("header", [b"{not json", b'{"a": 1}', b'{"a": {"dtype": "BF16", "shape": [2]}}', b"[1]"])
def test_a_damaged_header_is_refused(write: Write, header: bytes) -> None:
    directory = write()
    (directory / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    with pytest.raises(CheckpointError, match=r"model.safetensors: .*damaged"):
        Checkpoint.open(directory)


def test_a_header_whose_sizes_disagree_is_refused(write: Write) -> None:
    directory = write()
    header = json.dumps({"a": {"dtype": "BF16", "shape": [3], "data_offsets": [0, 4]}}).encode()
    (directory / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + b"0000")
    with pytest.raises(CheckpointError, match=r"a: BF16 \[3\] takes 6 bytes, the header gives 4"):
        Checkpoint.open(directory)


def test_a_missing_expert_is_named(write: Write) -> None:
    directory = write()
    tensors = load_file(directory / "model.safetensors")
    del tensors[EXPERT]
    save_file(tensors, directory / "model.safetensors")
    with pytest.raises(CheckpointError, match=re.escape(f"{EXPERT} is in no weight file")):
        Checkpoint.open(directory)


def test_an_index_that_names_an_absent_tensor_is_refused(write: Write) -> None:
    directory = write(num_shards=2)
    index_file = directory / "model.safetensors.index.json"
    index = json.loads(index_file.read_text())
    index["weight_map"]["ghost"] = "model-00001-of-00002.safetensors"
    index_file.write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="does not hold ghost"):
        Checkpoint.open(directory)


def test_an_index_cannot_lead_out_of_the_directory(write: Write) -> None:
    directory = write(num_shards=2)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "../a.safetensors"}}))
    with pytest.raises(CheckpointError, match="must lie beside the index"):
        Checkpoint.open(directory)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int8])
def test_quantised_experts_without_their_scales_are_refused_by_name(write: Write, dtype: torch.dtype) -> None:
    directory = write()
    tensors = load_file(directory / "model.safetensors")
    tensors[EXPERT] = tensors[EXPERT].to(dtype)
    save_file(tensors, directory / "model.safetensors")
    with pytest.raises(CheckpointError, match=f"{EXPERT} is stored as .* and has no scales beside it"):
        Checkpoint.open(directory)


def test_weights_that_do_not_fit_the_config_are_refused_with_both_shapes(write: Write) -> None:
    with pytest.raises(CheckpointError, match=r"has shape \[20, 48\], config.json asks for \[24, 48\]"):
        Checkpoint.open(write(moe_intermediate_size=24))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "llama"}, "model_type is 'llama'"),
        ({"hidden_size": ...}, "key 'hidden_size' is missing"),
        ({"num_hash_layers": "x"}, "num_hash_layers is 'x'"),
        ({"n_shared_experts": "two"}, "n_shared_experts is 'two'"),
        ({"architectures": 5}, "architectures is 5"),
        ({"engram_layer_ids": 5}, "engram_layer_ids is 5"),
        ({"dtype": "int8"}, "dtype is 'int8'"),
        ({"swiglu_limit": ...}, "key 'swiglu_limit' is missing"),
        ({"swiglu_limit": -1}, "swiglu_limit is -1"),
        ({"num_experts_per_tok": 0}, "num_experts_per_tok is 0"),
        ({"num_experts_per_tok": 7}, "num_experts_per_tok is 7, but n_routed_experts is 6"),
        ({"n_routed_experts": "six"}, "n_routed_experts is 'six'"),
        ({"engram_layer_ids": [3]}, r"engram_layer_ids names \[3\]"),
        (
            {"num_hidden_layers": 2},
            "num_hidden_layers is 2, 2 of them with routed experts, but the weight files hold experts of 3",
        ),
    ],
)
def test_a_bad_config_key_is_named_with_its_value(write: Write, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=f"config.json: {message}"):
        Checkpoint.open(write(**changes))


@pytest.mark.parametrize("text", ["", "{", "[]"])
def test_an_unreadable_config_is_refused(write: Write, text: str) -> None:
    directory = write()
    (directory / "config.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"config.json: "):
        Checkpoint.open(directory)


def test_a_missing_directory_or_config_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="is not a directory"):
        Checkpoint.open(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match=r"config.json: the file is missing"):
        Checkpoint.open(tmp_path)


@pytest.mark.parametrize("limit", [0, None])
def test_no_limit_means_no_clamp(write: Write, limit: float | None) -> None:
    assert Checkpoint.open(write(swiglu_limit=limit)).shape.swiglu_limit == math.inf


def test_the_fingerprint_depends_on_content_and_not_on_place(write: Write) -> None:
    one, two, three = write(name="one"), write(name="two"), write(name="three", swiglu_limit=2.0)
    edit_config(two, _name_or_path="/elsewhere", transformers_version="0")
    first = Checkpoint.open(one).fingerprint()
    assert Checkpoint.open(two).fingerprint() == first
    assert Checkpoint.open(three).fingerprint() != first
    with (one / "model.safetensors").open("r+b") as stream:
        stream.seek(-1000, 2)
        stream.write(b"\x01")
    assert Checkpoint.open(one).fingerprint() != first


def test_large_files_are_sampled_and_still_told_apart(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint_module, "WHOLE_FILE_BYTES", 1)
    one = write(name="one")
    first = Checkpoint.open(one).fingerprint()
    assert Checkpoint.open(write(name="two")).fingerprint() == first
    with (one / "model.safetensors").open("r+b") as stream:
        stream.seek(-1, 2)
        stream.write(b"\x55")
    assert Checkpoint.open(one).fingerprint() != first


def test_opening_a_checkpoint_imports_neither_vllm_nor_transformers() -> None:
    code = "import sys, moeray.deepseek_v4; sys.exit(any(m in sys.modules for m in ('vllm', 'transformers', 'ray')))"
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=120).returncode == 0


def hugging_face(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The same weights under the names of DeepSeek-V3; the last layer is a draft layer there."""
    parts = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}
    renamed = {}
    for name, tensor in tensors.items():
        for part, other in parts.items():
            name = name.replace(f".{part}.", f".{other}.")
        renamed["model." + name.replace(".ffn.", ".mlp.").replace("embed.weight", "embed_tokens.weight")] = tensor
    return renamed


V3 = {"model_type": "deepseek_v3", "num_hidden_layers": 2, "swiglu_limit": ..., "engram_layer_ids": ...}


def test_experts_under_v3s_names_are_the_same_experts_without_a_clamp(write: Write) -> None:
    v4 = Checkpoint.open(write(name="v4"))
    v3 = Checkpoint.open(write(hugging_face(load_file(v4.path / "model.safetensors")), name="v3", **V3))
    assert (v3.shape.moe_layers, v3.shape.swiglu_limit) == ((0, 1), math.inf)
    assert v3.expert_matrix(1, 2, "w2").weight.name == "model.layers.1.mlp.experts.2.down_proj.weight"
    for part in ("w1", "w2", "w3"):
        assert v3.expert_matrix(1, 2, part).shape == v4.expert_matrix(1, 2, part).shape
    assert v3.is_draft("model.layers.2.mlp.experts.0.up_proj.weight")
    assert not v3.is_draft("model.layers.1.mlp.experts.0.up_proj.weight")
    assert v3.is_routed_expert("model.layers.0.mlp.experts.3.gate_proj.weight_scale_inv")
    assert not v3.is_routed_expert("model.layers.0.mlp.shared_experts.gate_proj.weight")


def test_a_missing_expert_under_v3s_names_is_called_by_that_name(write: Write) -> None:
    tensors = hugging_face(load_file(write(name="v4") / "model.safetensors"))
    del tensors["model.layers.1.mlp.experts.2.up_proj.weight"]
    with pytest.raises(
        CheckpointError, match=r"model\.layers\.1\.mlp\.experts\.2\.up_proj\.weight is in no weight file"
    ):
        Checkpoint.open(write(tensors, **V3))


def test_every_problem_is_told_where_it_is_asked_for(write: Write) -> None:
    tensors = load_file(write(name="whole") / "model.safetensors")
    del tensors["layers.0.ffn.experts.1.w1.weight"]
    tensors["layers.2.ffn.experts.5.w2.weight"] = tensors["layers.2.ffn.experts.5.w2.weight"][:, 1:].contiguous()
    problems = [str(problem) for problem in Checkpoint.read(write(tensors)).problems()]
    assert len(problems) == 2
    assert "layers.0.ffn.experts.1.w1.weight is in no weight file" in problems[0]
    assert "layers.2.ffn.experts.5.w2.weight has shape [48, 19], config.json asks for [48, 20]" in problems[1]


def test_quantised_weights_of_the_shard_need_their_scales_too(write: Write) -> None:
    """Read as plain numbers they would make wrong text without any error."""
    tensors = load_file(write(name="plain") / "model.safetensors")
    tensors["layers.1.ffn.shared_experts.w1.weight"] = torch.zeros(20, 48).to(torch.float8_e4m3fn)
    with pytest.raises(CheckpointError, match=r"shared_experts\.w1\.weight is stored as F8_E4M3 and has no scales"):
        Checkpoint.open(write(tensors))


@pytest.mark.parametrize("missing", ["embed.weight", "layers.1.ffn.gate.weight"])
def test_a_missing_tensor_of_the_shard_is_found_before_anything_starts(write: Write, missing: str) -> None:
    tensors = load_file(write(name="plain") / "model.safetensors")
    del tensors[missing]
    with pytest.raises(CheckpointError, match=f"{re.escape(missing)} is in no weight file"):
        Checkpoint.open(write(tensors))


def test_a_layer_without_any_expert_is_a_problem(write: Write) -> None:
    tensors = load_file(write(name="plain") / "model.safetensors")
    kept = {name: tensor for name, tensor in tensors.items() if not name.startswith("layers.1.ffn.experts")}
    with pytest.raises(CheckpointError, match="3 of them with routed experts, but the weight files hold experts of 2"):
        Checkpoint.open(write(kept))
    dense_first = {"first_k_dense_replace": 1, **V3}
    kept = {name: tensor for name, tensor in hugging_face(tensors).items() if not name.startswith("model.layers.0.mlp")}
    assert Checkpoint.open(write(kept, name="v3", **dense_first)).shape.moe_layers == (1,)


def test_the_index_says_which_file_a_tensor_is_read_from(write: Write) -> None:
    directory = write(num_shards=2)
    index = json.loads((directory / "model.safetensors.index.json").read_text())["weight_map"]
    other = next(file for file in set(index.values()) if file != index[EXPERT])
    there = load_file(directory / other)
    save_file({**there, EXPERT: torch.zeros(20, 48, dtype=torch.bfloat16)}, directory / other)
    assert Checkpoint.open(directory).tensors[EXPERT].file.name == index[EXPERT]


def test_tensors_that_share_bytes_are_refused(tmp_path: Path) -> None:
    entry = {"dtype": "BF16", "shape": [4], "data_offsets": [0, 8]}
    header = json.dumps({"a": entry, "b": entry}).encode()
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(8))
    with pytest.raises(CheckpointError, match=r"begins at byte .*, the tensor before it ends at"):
        Checkpoint.open(tmp_path)


@pytest.mark.parametrize("name", [5, None, [1], "..", "a\0b", ""])
def test_a_weight_map_that_names_no_file_is_refused(write: Write, name: Any) -> None:
    directory = write(num_shards=2)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(CheckpointError, match="weight_map names"):
        Checkpoint.open(directory)


def test_the_fingerprint_is_of_what_was_opened_or_an_error(write: Write) -> None:
    directory = write()
    checkpoint = Checkpoint.open(directory)
    file = directory / "model.safetensors"
    replaced = file.read_bytes()
    file.unlink()
    file.write_bytes(replaced[:-1] + b"\x01")
    with pytest.raises(CheckpointError, match="was replaced or changed while it was read"):
        checkpoint.fingerprint()
