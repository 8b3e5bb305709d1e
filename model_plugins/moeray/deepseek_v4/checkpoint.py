"""A DeepSeek-V4 checkpoint directory: shape, tensor index and content id, without loading a weight."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any

from moeray.deepseek_v4.errors import CheckpointError
from moeray.deepseek_v4.shape import ModelShape, read_shape
from moeray.deepseek_v4.weight_files import DOWNLOAD_AGAIN, StoredTensor, WeightFile, read_headers, read_json

CONFIG_FILE = "config.json"
EXPERT_NAME = re.compile(r"layers\.(\d+)\.ffn\.experts\.(\d+)\.(w[123])\.weight")
EXPERT_DTYPES = ("BF16", "F16", "F32")
# keys that a converter rewrites without touching the model
NOT_CONTENT = ("_name_or_path", "transformers_version")
WHOLE_FILE_BYTES = 32 << 20
NUM_SAMPLES, SAMPLE_BYTES = 256, 4096


def expert_name(layer: int, expert: int, part: str) -> str:
    """DeepSeek's name of a routed expert's matrix; `part` is w1 (gate), w2 (down) or w3 (up)."""
    return f"layers.{layer}.ffn.experts.{expert}.{part}.weight"


@dataclass(frozen=True)
class Checkpoint:
    """An opened checkpoint. Holds no file open; every byte range was checked against the file sizes.

    Attributes:
        path: the directory.
        shape: what config.json says, with the layers that the weights really have.
        tensors: name -> place of its bytes.
    """

    path: Path
    shape: ModelShape
    tensors: Mapping[str, StoredTensor]
    config: Mapping[str, Any]
    weight_files: tuple[WeightFile, ...]

    @classmethod
    def open(cls, path: Path) -> Checkpoint:
        """Read config.json and the headers of all weight files (single-file or sharded with an index).

        Raises:
            CheckpointError: a missing, truncated or unusable file, a missing expert, an unsupported expert dtype.
        """
        if not path.is_dir():
            raise CheckpointError(path, "is not a directory", "give the directory that holds config.json")
        config = read_json(path / CONFIG_FILE)
        weight_files, tensors = read_headers(path)
        experts = {tuple(map(int, match.groups()[:2])) for name in tensors if (match := EXPERT_NAME.fullmatch(name))}
        shape = read_shape(path / CONFIG_FILE, config, {layer for layer, _ in experts})
        _check_experts(path, shape, tensors)
        return cls(path, shape, MappingProxyType(tensors), MappingProxyType(config), weight_files)

    def bytes_of(self, names: Iterable[str]) -> int:
        """Stored bytes of the named tensors."""
        return sum(self.tensors[name].num_bytes for name in names)

    def expert_names(self, layer: int, experts: Iterable[int]) -> list[str]:
        """Names of every matrix of these routed experts of `layer`."""
        return [expert_name(layer, expert, part) for expert in experts for part in ("w1", "w2", "w3")]

    def fingerprint(self) -> str:
        """Content id (32 hex digits) of the model: equal for equal weights and config, wherever they lie.

        SHA-256 over config.json (keys sorted, without those that converters rewrite) and, per weight file in
        name order, its name, size, header and bytes: all of them up to 32 MiB, else 256 samples of 4 KiB at
        even distances and the last 4 KiB. So a file of another model, another training step or another length
        is told apart; a flipped byte between two samples of a large file is not: this is an identity, not a
        check of integrity.

        Raises:
            CheckpointError: a file went away or became shorter since `open`.
        """
        return self._fingerprint

    @cached_property
    def _fingerprint(self) -> str:
        content = {key: value for key, value in self.config.items() if key not in NOT_CONTENT}
        digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode())
        for weight_file in sorted(self.weight_files, key=lambda each: each.file.name):
            digest.update(f"\0{weight_file.file.name}\0{weight_file.size_bytes}\0".encode())
            digest.update(weight_file.header)
            _sample(digest, weight_file)
        return digest.hexdigest()[:32]


def _sample(digest: hashlib._Hash, weight_file: WeightFile) -> None:
    size = weight_file.size_bytes
    if size <= WHOLE_FILE_BYTES:
        ranges = [(0, size)]
    else:
        last = size - SAMPLE_BYTES
        ranges = [(last * step // NUM_SAMPLES, SAMPLE_BYTES) for step in range(NUM_SAMPLES + 1)]
    try:
        with weight_file.file.open("rb") as stream:
            for offset, length in ranges:
                stream.seek(offset)
                data = stream.read(length)
                if len(data) != length:
                    raise CheckpointError(weight_file.file, f"became shorter than {size} bytes", DOWNLOAD_AGAIN)
                digest.update(data)
    except OSError as error:
        raise CheckpointError(weight_file.file, f"cannot be read ({error})", DOWNLOAD_AGAIN) from None


def _check_experts(path: Path, shape: ModelShape, tensors: Mapping[str, StoredTensor]) -> None:
    """Every MoE layer holds every expert, in a dtype and shape that the expert group can compute with."""
    config_file = path / CONFIG_FILE
    if not shape.moe_layers:
        raise CheckpointError(
            config_file,
            "no weight file holds a tensor like " + expert_name(0, 0, "w1"),
            "give DeepSeek's own tensor names",
        )
    if shape.moe_layers[-1] >= shape.num_layers:
        raise CheckpointError(
            config_file,
            f"num_hidden_layers is {shape.num_layers}, but layer {shape.moe_layers[-1]} has experts",
            DOWNLOAD_AGAIN,
        )
    wide, deep = (shape.intermediate_size, shape.hidden_size), (shape.hidden_size, shape.intermediate_size)
    for layer in shape.moe_layers:
        for expert in range(shape.num_experts):
            for part, expected in (("w1", wide), ("w2", deep), ("w3", wide)):
                _check_matrix(
                    config_file,
                    tensors.get(expert_name(layer, expert, part)),
                    expected,
                    expert_name(layer, expert, part),
                )


def _check_matrix(config_file: Path, tensor: StoredTensor | None, expected: tuple[int, int], name: str) -> None:
    if tensor is None:
        raise CheckpointError(config_file, f"{name} is in no weight file, but config.json asks for it", DOWNLOAD_AGAIN)
    if tensor.dtype not in EXPERT_DTYPES:
        raise CheckpointError(
            tensor.file,
            f"{name} is stored as {tensor.dtype}, which expert groups cannot compute with yet",
            f"convert the routed experts to one of {', '.join(EXPERT_DTYPES)}",
        )
    if tensor.shape != expected:
        raise CheckpointError(
            tensor.file, f"{name} has shape {list(tensor.shape)}, config.json asks for {list(expected)}", DOWNLOAD_AGAIN
        )
