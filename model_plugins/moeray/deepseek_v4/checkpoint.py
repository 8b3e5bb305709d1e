"""A checkpoint directory of the family: shape, tensor index and content id, without loading a weight."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any

from moeray.deepseek_v4.errors import CheckpointError
from moeray.deepseek_v4.formats import NEEDS_SCALES, StoredMatrix, stored_matrix
from moeray.deepseek_v4.names import DEEPSEEK, HUGGING_FACE, PARTS, TensorNames
from moeray.deepseek_v4.shape import UNCLAMPED_FAMILIES, ModelShape, read_shape
from moeray.deepseek_v4.weight_files import DOWNLOAD_AGAIN, StoredTensor, WeightFile, read_headers, read_json

CONFIG_FILE = "config.json"
# DeepSeek's own name, or Hugging Face's, which numbers them after the model's layers
DRAFT_LAYER = re.compile(r"mtp\.|model\.layers\.(\d+)\.")
# keys that a converter rewrites without touching the model
NOT_CONTENT = ("_name_or_path", "transformers_version")
WHOLE_FILE_BYTES = 32 << 20
NUM_SAMPLES, SAMPLE_BYTES = 256, 4096


@dataclass(frozen=True)
class Checkpoint:
    """An opened checkpoint. Holds no file open; every byte range was checked against the file sizes.

    Attributes:
        path: the directory.
        shape: what config.json says, with the layers that the weights really have.
        names: how its tensors are named.
        tensors: name -> place of its bytes.
    """

    path: Path
    shape: ModelShape
    names: TensorNames
    tensors: Mapping[str, StoredTensor]
    config: Mapping[str, Any]
    weight_files: tuple[WeightFile, ...]

    @classmethod
    def open(cls, path: Path) -> Checkpoint:
        """Read config.json and the headers of all weight files (single-file or sharded with an index), and check them.

        Raises:
            CheckpointError: a missing, truncated or unusable file, a missing expert, a format that is not known.
        """
        checkpoint = cls.read(path)
        for problem in checkpoint.problems():
            raise problem
        return checkpoint

    @classmethod
    def read(cls, path: Path) -> Checkpoint:
        """As `open`, but leaves it to the caller to ask for `problems`.

        Raises:
            CheckpointError: a file is missing, truncated or damaged, or config.json lacks a key.
        """
        if not path.is_dir():
            raise CheckpointError(path, "is not a directory", "give the directory that holds config.json")
        config = read_json(path / CONFIG_FILE)
        weight_files, tensors = read_headers(path)
        names = HUGGING_FACE if config.get("model_type") in UNCLAMPED_FAMILIES else DEEPSEEK
        layers = {int(match[1]) for name in tensors if (match := names.expert_tensor.fullmatch(name))}
        if names is HUGGING_FACE:  # there, draft layers are numbered after the model's own
            layers = {layer for layer in layers if layer < int(config.get("num_hidden_layers") or 0)}
        shape = read_shape(path / CONFIG_FILE, config, layers)
        return cls(path, shape, names, MappingProxyType(tensors), MappingProxyType(config), weight_files)

    def problems(self) -> Iterator[CheckpointError]:
        """Everything that keeps it from being served: missing tensors, wrong shapes, unknown formats."""
        yield from self._problems_of_layers()
        for name in self.tensors:
            # Routed experts are checked below; draft layers are not read.
            if self.is_quantised(name) and not self.is_routed_expert(name) and not self.is_draft(name):
                try:
                    self.matrix(name)
                except CheckpointError as error:
                    yield error
        for layer in self.shape.moe_layers:
            for expert in range(self.shape.num_experts):
                yield from self._problems_of_expert(layer, expert)

    def _problems_of_layers(self) -> Iterator[CheckpointError]:
        config_file, shape = self.path / CONFIG_FILE, self.shape
        if not shape.moe_layers:
            example = self.names.expert_weight(0, 0, "w1")
            yield CheckpointError(
                config_file, f"no weight file holds a tensor like {example}", "give the published tensor names"
            )
            return
        if shape.moe_layers[-1] >= shape.num_layers or len(shape.moe_layers) != shape.num_moe_layers:
            yield CheckpointError(
                config_file,
                f"num_hidden_layers is {shape.num_layers}, {shape.num_moe_layers} of them with routed experts, but the "
                f"weight files hold experts of {len(shape.moe_layers)} layers up to layer {shape.moe_layers[-1]}",
                DOWNLOAD_AGAIN,
            )
        for name in (self.names.embedding, *map(self.names.router, shape.moe_layers)):
            if name not in self.tensors:
                yield self._missing(name)

    def _missing(self, name: str) -> CheckpointError:
        return CheckpointError(
            self.path / CONFIG_FILE, f"{name} is in no weight file, but config.json asks for it", DOWNLOAD_AGAIN
        )

    def _problems_of_expert(self, layer: int, expert: int) -> Iterator[CheckpointError]:
        wide = (self.shape.intermediate_size, self.shape.hidden_size)
        for part, expected in zip(PARTS, (wide, wide[::-1], wide), strict=True):
            try:
                matrix = self.expert_matrix(layer, expert, part)
            except CheckpointError as error:
                yield error
                continue
            if matrix.shape != expected:
                wrong = f"has shape {list(matrix.shape)}, config.json asks for {list(expected)}"
                yield CheckpointError(matrix.weight.file, f"{matrix.weight.name} {wrong}", DOWNLOAD_AGAIN)

    def matrix(self, name: str) -> StoredMatrix:
        """The weight tensor `name` with its scales, if it has any.

        Raises:
            CheckpointError: it is in no weight file, or in an unknown format.
        """
        weight = self.tensors.get(name)
        if weight is None:
            raise self._missing(name)
        return stored_matrix(weight, self.tensors.get(self.names.scale_of(name)), self.shape.fp8_block)

    def expert_matrix(self, layer: int, expert: int, part: str) -> StoredMatrix:
        """One matrix of a routed expert; `part` is w1 (gate), w2 (down) or w3 (up), whatever the checkpoint calls it.

        Raises:
            CheckpointError: see `matrix`.
        """
        return self.matrix(self.names.expert_weight(layer, expert, part))

    def is_routed_expert(self, name: str) -> bool:
        """Whether the tensor belongs to a routed expert (weights or scales)."""
        return self.names.expert_tensor.fullmatch(name) is not None

    def is_draft(self, name: str) -> bool:
        """Whether the tensor belongs to a draft (MTP) layer."""
        layer = DRAFT_LAYER.match(name)
        return layer is not None and (layer[1] is None or int(layer[1]) >= self.shape.num_layers)

    def is_quantised(self, name: str) -> bool:
        """Whether the tensor's values are told only together with scales (which may be missing)."""
        if self.is_scale(name):
            return False
        return self.names.scale_of(name) in self.tensors or self.tensors[name].dtype in NEEDS_SCALES

    def is_scale(self, name: str) -> bool:
        """Whether the tensor holds the scales of another one."""
        weight = self.names.weight_of(name)
        return weight is not None and weight in self.tensors

    def bytes_of(self, names: Iterable[str]) -> int:
        """Stored bytes of the named tensors."""
        return sum(self.tensors[name].num_bytes for name in names)

    def expert_names(self, layer: int, experts: Iterable[int]) -> list[str]:
        """Names of every tensor (weights and scales) of these routed experts of `layer`."""
        return [
            tensor.name
            for expert in experts
            for part in PARTS
            for tensor in self.expert_matrix(layer, expert, part).tensors
        ]

    def fingerprint(self) -> str:
        """Content id (32 hex digits) of the model: equal for equal weights and config, wherever they lie.

        SHA-256 over config.json (keys sorted, without those that converters rewrite) and, per weight file in
        name order, its name, size, header and bytes: all of them up to 32 MiB, else 256 samples of 4 KiB at
        even distances and the last 4 KiB. So a file of another model, another training step or another length
        is told apart; a flipped byte between two samples of a large file is not: this is an identity, not a
        check of integrity. Asked for after loading it is the identity of what was loaded: a file that was replaced or
        changed since `open` is an error.

        Raises:
            CheckpointError: a file went away, became shorter or changed since `open`.
        """
        return self._fingerprint

    @cached_property
    def _fingerprint(self) -> str:
        return fingerprint_of(self.config, self.weight_files)


def fingerprint_of(config: Mapping[str, Any], weight_files: Sequence[WeightFile]) -> str:
    """As `Checkpoint.fingerprint`, of any model's files."""
    content = {key: value for key, value in config.items() if key not in NOT_CONTENT}
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode())
    for weight_file in sorted(weight_files, key=lambda each: each.file.name):
        digest.update(f"\0{weight_file.file.name}\0{weight_file.size_bytes}\0".encode())
        digest.update(weight_file.header)
        _sample(digest, weight_file)
    for weight_file in weight_files:
        _require_unchanged(weight_file)
    return digest.hexdigest()[:32]


def _require_unchanged(weight_file: WeightFile) -> None:
    try:
        found = weight_file.file.stat()
    except OSError as error:
        raise CheckpointError(weight_file.file, f"cannot be read ({error})", DOWNLOAD_AGAIN) from None
    weight_file.require_unchanged(found)


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
