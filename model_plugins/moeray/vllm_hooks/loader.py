"""vLLM load format `moeray`: reads from the checkpoint exactly the tensors the shard keeps, and counts them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from vllm.model_executor.model_loader import register_model_loader
from vllm.model_executor.model_loader.base_loader import BaseModelLoader

from moeray.deepseek_v4.checkpoint import Checkpoint
from moeray.deepseek_v4.errors import CheckpointError
from moeray.deepseek_v4.tensor_reader import TensorReader, activation_dtype, read_matrix

LOAD_FORMAT = "moeray"


@dataclass(frozen=True, slots=True)
class LoadReport:
    """What the last load took from the disk.

    Attributes:
        names: tensors read, as the checkpoint names them.
        skipped: tensors left unread.
        bytes_read, bytes_total: of all tensors.
        fingerprint: content id of what was loaded.
    """

    names: tuple[str, ...]
    skipped: tuple[str, ...]
    bytes_read: int
    bytes_total: int
    fingerprint: str


_last_report: LoadReport | None = None


def last_report() -> LoadReport | None:
    """The report of this process' last load; None where nothing was loaded with this format."""
    return _last_report


@register_model_loader(LOAD_FORMAT)
class ShardLoader(BaseModelLoader):  # type: ignore[misc, unused-ignore]
    """Leaves unread what `model.is_unused_checkpoint_weight` names."""

    def download_model(self, model_config: Any) -> None:
        """Nothing: the checkpoint is a directory on this machine."""

    def load_weights(self, model: nn.Module, model_config: Any) -> None:
        """Fill every parameter of `model`.

        Raises:
            CheckpointError: a file is missing or truncated, or a parameter got no tensor.
        """
        global _last_report
        directory = Path(model_config.model)
        checkpoint = Checkpoint.open(directory)
        # Without a quantisation method (on CPU, see engine_args) vLLM's layers are plain and hold values.
        as_values = model_config.quantization is None
        unused: Any = model.is_unused_checkpoint_weight
        skipped = tuple(name for name in checkpoint.tensors if unused(name))
        names = tuple(name for name in checkpoint.tensors if not unused(name))
        with TensorReader() as reader:
            weights = _values(checkpoint, names, reader) if as_values else _stored(checkpoint, names, reader)
            loaded: set[str] = model.load_weights(weights)  # type: ignore[operator, unused-ignore]
            bytes_read = reader.bytes_read
        missing = sorted({name for name, _ in model.named_parameters()} - loaded)
        if missing:
            raise CheckpointError(directory, f"no tensor for {', '.join(missing)}", "download the checkpoint again")
        _last_report = LoadReport(
            names, skipped, bytes_read, checkpoint.bytes_of(checkpoint.tensors), checkpoint.fingerprint()
        )


def _stored(checkpoint: Checkpoint, names: tuple[str, ...], reader: TensorReader) -> Iterator[tuple[str, Tensor]]:
    """Every tensor as it is stored, scales among them."""
    for name in names:
        yield name, reader.read([checkpoint.tensors[name]])


def _values(checkpoint: Checkpoint, names: tuple[str, ...], reader: TensorReader) -> Iterator[tuple[str, Tensor]]:
    """Quantised tensors as their values, in the activations' dtype; no scales."""
    dtype = activation_dtype(checkpoint)
    for name in names:
        if checkpoint.is_scale(name):
            continue
        if checkpoint.is_quantised(name):
            yield name, read_matrix(reader, checkpoint.matrix(name), dtype)
        else:
            yield name, reader.read([checkpoint.tensors[name]])
